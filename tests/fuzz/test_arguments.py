"""Nonsense in function arguments: a LandscapeError that says why, or exactly what the obvious way gives."""

import copy
import math
import warnings
from dataclasses import fields, replace
from pathlib import PurePath

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from nonsense import NUMBERS, also, anything, cases, soon, texts
from torch import nn

from landscape import RECIPES, LandscapeError, LandscapeProbe, make_norm, ray_losses
from landscape.names import NORMS

INPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def closure(model):
    return model(INPUTS).square().mean()


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def direction_of(model):
    return {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}


def moved_losses(model, direction, step_sizes):
    """The obvious way: a copy of the model for each point, its parameters moved by hand."""
    losses = []
    for eta in step_sizes:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, tensor in direction.items():
                moved.get_parameter(name).sub_(tensor.double() * eta)
            losses.append(closure(moved))
    return torch.stack(losses)


def is_step_size(value):
    try:
        return not isinstance(value, bool | str | bytes) and abs(float(value)) < 1e308
    except (TypeError, ValueError, OverflowError):
        return False


finite = st.floats(-1e3, 1e3) | st.integers(-9, 9) | st.sampled_from([np.float32(0.5), np.int64(2), 0.0, -0.0, 1e-300])
step_sizes = (
    st.lists(finite, min_size=1, max_size=6)
    | st.lists(finite | st.sampled_from(NUMBERS), max_size=4)
    | st.lists(st.floats(-9, 9), min_size=1, max_size=4).map(np.array)
    | st.lists(st.floats(-9, 9), min_size=1, max_size=4).map(lambda values: torch.tensor(values, dtype=torch.float64))
    | anything
)


@cases(0.08)
@given(step_sizes=step_sizes, engine=st.sampled_from(["auto", "tape", "loop"]))
@example(step_sizes="12", engine="loop")
@example(step_sizes=[True, 10**400], engine="loop")
@example(step_sizes=[10**400], engine="auto")
def test_step_sizes_are_refused_or_measured_in_their_order(step_sizes, engine):
    model = small_model()
    direction = direction_of(model)
    with soon("step sizes"):
        try:
            losses = ray_losses(model, closure, direction, step_sizes, engine=engine)
        except LandscapeError:
            assert not (isinstance(step_sizes, list) and step_sizes and all(map(is_step_size, step_sizes)))
        else:
            assert not isinstance(step_sizes, str | bytes | dict)
            assert not any(isinstance(eta, bool | str) for eta in step_sizes)
            numbers = torch.tensor([float(eta) for eta in step_sizes], dtype=torch.float64)
            expected = moved_losses(model, direction, numbers.tolist())
            near = numbers.abs() < 1e100  # beyond, sums overflow, and their order matters
            torch.testing.assert_close(losses[near], expected[near], rtol=1e-9, atol=1e-9)


WRONG = {
    "nothing": None,
    "a number": 1.0,
    "an array": np.ones((4, 3)),
    "other shape": torch.ones(3, 4),
    "scalar": torch.ones(()),
    "complex": torch.ones(4, 3, dtype=torch.complex128),
    "no memory": torch.ones(4, 3, device="meta"),
    "sparse": torch.ones(4, 3).to_sparse(),
}
FITTING = {
    "NaN": torch.full((4, 3), math.nan),
    "inf": torch.full((4, 3), math.inf),
    "float32": torch.ones(4, 3),
    "whole numbers": torch.ones(4, 3, dtype=torch.int64),
    "one stretched": torch.ones(1, 1).expand(4, 3),
    "transposed": torch.ones(3, 4).t(),
    "a parameter": nn.Parameter(torch.ones(4, 3, dtype=torch.float64)),
}


@pytest.mark.parametrize("weight", [*WRONG, *FITTING])
@cases(0.004)
@given(
    left_out=st.sets(st.sampled_from(["0.bias", "2.weight", "2.bias"])),
    extra=st.none() | texts,
    engine=st.sampled_from(["auto", "tape", "loop"]),
)
def test_directions_are_refused_or_walked_along(weight, left_out, extra, engine):
    model = small_model()
    direction = {name: tensor for name, tensor in direction_of(model).items() if name not in left_out}
    direction["0.weight"] = (WRONG | FITTING)[weight]
    if extra is not None:
        direction[extra] = torch.ones(())
    with soon("directions"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The engine '.*' does not fit")
        try:
            losses = ray_losses(model, closure, direction, [0.5, -1.0, 0.5], engine=engine)
        except LandscapeError:
            assert weight in WRONG or extra is not None
        else:
            assert weight in FITTING
            expected = moved_losses(model, direction, [0.5, -1.0, 0.5])
            torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


OPTIONS = (
    "step_sizes",
    "every",
    "overhead",
    "max_memory",
    "steps_per_epoch",
    "gradients",
    "critical",
    "direction",
    "relative",
    "engine",
)


def trained(options=None):
    """Parameters after three updates, and the rows of the probe if there was one."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.MSELoss()
    probe = None if options is None else LandscapeProbe(model, optimizer, criterion, **options).attach()
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(INPUTS), INPUTS[:, :1]).backward()
        optimizer.step()
    if probe is not None:
        probe.detach()
    return nn.utils.parameters_to_vector(model.parameters()), probe


@cases(0.08)
@given(options=st.dictionaries(st.sampled_from(OPTIONS), anything | step_sizes, min_size=1, max_size=2))
@also("options", {"overhead": 10**400}, {"direction": np.zeros(2)}, {"engine": np.zeros(2)}, {"relative": np.zeros(2)})
def test_options_of_the_probe_are_refused_or_do_not_touch_the_training(options):
    plain, _ = trained()
    with soon("options of the probe"):
        try:
            # A function of the step may give anything too; from the second update on that is a warning.
            parameters, probe = trained({"step_sizes": [0.1], **options})
        except LandscapeError:
            return
    assert parameters.equal(plain)
    assert set(probe.frame()["step"]) <= {0, 1, 2}


@cases(0.08)
@given(
    changes=st.dictionaries(st.sampled_from([each.name for each in fields(RECIPES["digits"])]), anything, max_size=2)
)
@also("changes", {"name": "../../x"}, {"name": "x" * 5000}, {"name": "\x1b"}, {"name": ""}, {"norm": []})
@also("changes", {"epochs": 2**63}, {"lr": 1e308}, {"lr": "0.1"}, {"overhead": 10**400}, {"augment": ([],)})
def test_recipes_are_refused_or_have_a_name_that_stays_in_its_folder(changes):
    with soon("recipes"):
        try:
            recipe = replace(RECIPES["digits"], **changes).resolve()
        except LandscapeError:
            return
    assert len(PurePath("out", recipe.run_name).parts) == 2
    assert ".." not in recipe.run_name[:2]
    assert recipe.run_name.isprintable()
    assert len(recipe.run_name.encode()) < 500


NORM_OPTIONS = ("groups", "group_size", "channel_groups", "eps", "momentum", "affine", "track_running_stats", "layout")


@cases(0.06)
@given(
    name=st.sampled_from([*NORMS]) | texts,
    options=st.dictionaries(st.sampled_from(NORM_OPTIONS) | texts, anything, max_size=3),
    features=st.sampled_from([4, 4, 4, 0, -1, 3, 2.5, "4", None, True]),
)
@example(name="ghost", options={"groups": "2"}, features=4)
@example(name="ghost", options={"groups": 2.5}, features=4)
@example(name="seq", options={"groups": 2, "channel_groups": "2"}, features=4)
@example(name="batch", options={"momentum": "0.1"}, features=4)
@example(name="layer", options={"eps": []}, features=4)
def test_norms_are_refused_or_normalize(name, options, features):
    images = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    with soon("norms"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "groups=.*normalized to")
        try:
            outputs = make_norm(name, **options)(features)(images)
        except LandscapeError:
            return
    assert outputs.shape == images.shape
    if not options:
        expected = {"none": images, "batch": F.batch_norm(images, None, None, training=True)}
        torch.testing.assert_close(outputs, expected.get(name, outputs))
