import pytest
import torch
from torch.nn.functional import pad

from landscape.training.augmentation import augmentation
from landscape.training.recipe import AUGMENTATIONS

IMAGES = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_crop_is_window_of_padded_image():
    cropped, places = augmentation(["crop"])(IMAGES), set()
    for image, padded in zip(cropped, pad(IMAGES, (4, 4, 4, 4)), strict=True):
        windows = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        found = [place for place, window in windows.items() if torch.equal(window, image)]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 30
    assert {y for y, _ in places} == {x for _, x in places} == set(range(9))


def test_flip_mirrors_half():
    flipped = augmentation(["flip"])(IMAGES)
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, IMAGES, strict=True)]
    kept = [torch.equal(new, old) for new, old in zip(flipped, IMAGES, strict=True)]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert 16 < sum(mirrored) < 48


def test_cutout_zeroes_a_square_around_any_pixel():
    """The squares of all centers, clipped at the borders; each image has one of them."""
    centers = {}
    for y in range(32):
        for x in range(32):
            square = torch.zeros(32, 32, dtype=torch.bool)
            square[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = True
            centers[square.numpy().tobytes()] = y, x
    found = set()
    for _ in range(20):
        for new, old in zip(augmentation(["cutout"])(IMAGES), IMAGES, strict=True):
            cut = (new == 0).all(0)
            found.add(centers[cut.numpy().tobytes()])
            assert torch.equal(new[:, ~cut], old[:, ~cut])
    assert {y for y, _ in found} == {x for _, x in found} == set(range(32))


@pytest.mark.parametrize("size", [8, 28, 32])
def test_all_augmentations_equal_those_of_single_images(size):
    images = IMAGES[..., :size, :size]
    torch.manual_seed(1)
    augmented = augmentation(AUGMENTATIONS)(images)
    torch.manual_seed(1)
    margin, half = size // 8, size // 4
    corners, flips = torch.randint(2 * margin + 1, (2, 64)), torch.randint(2, (64,))
    for new, image, (top, left), flip, (y, x) in zip(
        augmented, images, corners.T, flips, torch.randint(size, (2, 64)).T, strict=True
    ):
        expected = pad(image, [margin] * 4)[:, top : top + size, left : left + size].clone()
        expected = expected.flip(-1) if flip else expected
        expected[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
        assert torch.equal(new, expected)


def test_augmentation_is_reproducible():
    augment = augmentation(AUGMENTATIONS)
    torch.manual_seed(1)
    first, second = augment(IMAGES), augment(IMAGES)
    torch.manual_seed(1)
    assert torch.equal(augment(IMAGES), first)
    assert not torch.equal(first, second)


def test_augmentation_of_small_images():
    assert augmentation(AUGMENTATIONS)(IMAGES[:, :1, :8, :8]).shape == (64, 1, 8, 8)


def test_augmentation_without_names():
    assert augmentation(())(IMAGES) is IMAGES


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_reads_no_values(name):
    # Tensors on this device have no values, so that reading one fails.
    assert augmentation([name])(IMAGES.to("meta")).shape == IMAGES.shape


def test_augmentations_are_applied_in_order():
    torch.manual_seed(1)
    both = augmentation(["crop", "flip"])(IMAGES)
    torch.manual_seed(1)
    assert torch.equal(both, augmentation(["flip"])(augmentation(["crop"])(IMAGES)))
