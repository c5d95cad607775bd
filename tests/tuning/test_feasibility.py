from dataclasses import replace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from landscape import RECIPES
from landscape.data.dataset import load_dataset
from landscape.errors import LandscapeError
from landscape.training.experiment import initial_model
from landscape.tuning.feasibility import _extrapolated, check_feasible, seconds_per_training
from landscape.tuning.plan import TuningConfig
from landscape.tuning.strategies import candidates

TUNING = TuningConfig(
    RECIPES["classify-digits"],
    norms=("batch", "ghost", "group", "seq"),
    groups=(1, 2, 7, 32, 128, 300),
    channel_groups=(1, 3, 4, 1000),
)


def refusals(tuning):
    """Return why configurations cannot be trained, by running their models: the slow twin."""
    recipe = tuning.recipe.resolve()
    data = load_dataset(recipe.dataset, None, torch.device("cpu")).split(recipe.validation, recipe.train_samples)
    found = {}
    for norm in tuning.norms:
        for each in candidates(norm, tuning.channel_groups, tuning.groups):
            try:
                initial_model(tuning.trainings([each])[0].resolve(), data)
            except LandscapeError as error:
                found[each] = str(error)
    return found


@pytest.mark.parametrize("model", ["simplenet", "resnet20"])
def test_plan_is_that_of_real_models(model):
    tuning = replace(TUNING, recipe=replace(TUNING.recipe, model=model))
    plan, expected = check_feasible(tuning, device="cpu"), refusals(tuning)
    assert plan.impossible == expected != {}
    for norm in tuning.norms:
        requested = candidates(norm, tuning.channel_groups, tuning.groups)
        assert plan.possible[norm] == tuple(each for each in requested if each not in expected)


@pytest.mark.parametrize(
    "tuning",
    [replace(TUNING, norms=("ghost",), groups=(300,)), replace(TUNING, norms=("seq",), channel_groups=(1000,))],
)
def test_norm_without_configuration_is_refused(tuning):
    with pytest.raises(LandscapeError) as actual:
        check_feasible(tuning, device="cpu")
    assert next(iter(refusals(tuning).values())) in str(actual.value)


@pytest.mark.parametrize(
    "tuning",
    [
        replace(TUNING, runs=0),
        replace(TUNING, norms=("ghost",), groups=()),
        replace(TUNING, recipe=replace(TUNING.recipe, batch_size=5000)),
    ],
)
def test_impossible_search_is_refused(tuning):
    with pytest.raises(LandscapeError):
        check_feasible(tuning, device="cpu")


def test_plan_computes_nothing():
    devices = set()
    hook = register_module_forward_pre_hook(lambda module, inputs: devices.add(inputs[0].device.type))
    try:
        plan = check_feasible(replace(TUNING, recipe=replace(TUNING.recipe, model="wrn-28-10")), device="cpu")
    finally:
        hook.remove()
    assert devices == {"meta"}
    assert len(plan.tried()) > 5


def test_estimate_of_a_large_model_runs_no_whole_batch(monkeypatch):
    """A network whose smallest part of a batch takes longer than LONG_ENOUGH."""
    monkeypatch.setattr("landscape.tuning.feasibility.LONG_ENOUGH", 0.0)
    batches = set()
    hook = register_module_forward_pre_hook(lambda module, inputs: batches.add(len(inputs[0])))
    try:
        seconds = seconds_per_training(check_feasible(TUNING, device="cpu"), device="cpu")
    finally:
        hook.remove()
    assert batches - {128} == {2}  # 128: on the device meta
    assert seconds > 0


@pytest.mark.parametrize(("batch", "cost"), [(512, 0.001), (512, 0.1), (512, 2.0), (3, 0.1), (1, 5.0), (7, 1e-9)])
def test_extrapolated_seconds(batch, cost):
    parts = []

    def seconds(part):
        parts.append(part)
        return cost * part

    assert _extrapolated(seconds, batch) == pytest.approx(batch * cost)
    assert all(1 <= part <= batch for part in parts)
    assert parts[-1] == batch or parts[-1] * cost > 1


def test_meta_is_no_device_to_train_on():
    with pytest.raises(LandscapeError, match="device='meta'"):
        check_feasible(TUNING, device="meta")
    assert torch.get_default_device().type == "cpu"
