"""Recipes on an accelerator: the same data and initial weights as on a CPU, augmented without waiting, and resumed."""

from dataclasses import replace

import pytest
import torch
from resuming import check_same

from landscape import RECIPES, read_traces, train
from landscape.rng import RngState, has_rng_state, load_rng_state_dict, rng_state_dict
from landscape.training.augmentation import augmentation
from landscape.training.experiment import Experiment
from landscape.training.recipe import AUGMENTATIONS

SHORT = replace(RECIPES["digits"], train_samples=640, epochs=2, precision="float64")


class Stop(Exception):
    """Stops a training between two updates."""


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_does_not_wait(name, device, forbids_waiting):
    images = torch.randn(16, 3, 16, 16, device=device)
    with forbids_waiting():
        augmented = augmentation([name])(images)
    assert augmented.device == device
    assert not torch.equal(augmented, images)


def test_augmented_epochs_do_not_wait(device, forbids_waiting):
    recipe = replace(SHORT, augment=AUGMENTATIONS, precision="float32", norm="ghost")
    updates = Experiment(recipe, device=str(device)).epoch()
    next(updates)
    with forbids_waiting():
        assert len(list(updates)) == 4


def test_experiment_is_that_of_the_cpu(device):
    experiments = [Experiment(SHORT, device=place) for place in ("cpu", str(device))]
    with device:
        experiments.append(Experiment(SHORT, device="cpu"))
    first, *others = ([*one.model.state_dict().values(), one.data.train.inputs] for one in experiments)
    for other in others:
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, other, strict=True))
    losses = []
    for one, default in zip(experiments, ("cpu", "cpu", device), strict=True):
        with torch.device(default):
            losses.append([loss.item() for loss in one.epoch()])
    assert losses[2] == losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.parametrize("changes", [{"norm": "ghost"}, {"augment": ("crop", "cutout"), "engine": "loop"}], ids=str)
def test_resume_on_a_device(tmp_path, changes, device):
    """The random numbers of augmentation are the device's own."""
    recipe = replace(SHORT, **changes)
    whole = train(recipe, tmp_path / "whole", device=str(device))

    def stop(probe):
        if probe.step == 7:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, tmp_path / "parts", device=str(device), on_update=stop)
    torch.manual_seed(99)
    parts = train(recipe, tmp_path / "parts", device=str(device), resume=True)
    if device.type == "desk":
        check_same(parts, whole)
    one, other = (read_traces(place)["loss"].tolist() for place in (parts, whole))
    assert one == pytest.approx(other, rel=1e-6)


def test_random_numbers_of_a_device_are_restored(device):
    assert has_rng_state(device)
    assert not any(has_rng_state(torch.device(kind)) for kind in ("cpu", "meta"))
    saved, state = rng_state_dict(device), RngState.capture([device])
    expected = torch.rand(3, device=device)
    for restore in (state.restore, lambda: load_rng_state_dict(saved, device)):
        torch.rand(2, device=device)
        restore()
        assert torch.equal(torch.rand(3, device=device), expected)
