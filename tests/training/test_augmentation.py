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


def test_cutout_zeroes_one_square():
    cut = augmentation(["cutout"])(IMAGES)
    for new, old in zip(cut, IMAGES, strict=True):
        rows, columns = (new == 0).all(0).nonzero(as_tuple=True)
        assert len(rows) == 16 * 16
        assert rows.max() - rows.min() == columns.max() - columns.min() == 15
        kept = new != 0
        assert torch.equal(new[kept], old[kept])


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
