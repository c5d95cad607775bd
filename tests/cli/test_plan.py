from dataclasses import replace

import pytest
import torch
from landscape_cli.plan import _extrapolated, make_plan, seconds_per_training
from torch.nn.modules.module import register_module_forward_pre_hook

from landscape import RECIPES
from landscape.errors import LandscapeError
from landscape.tuning.feasibility import check_feasible
from landscape.tuning.plan import TuningConfig

TUNING = TuningConfig(
    RECIPES["classify-digits"],
    norms=("batch", "ghost", "group", "seq"),
    groups=(1, 2, 7, 32, 128, 300),
    channel_groups=(1, 3, 4, 1000),
)


@pytest.mark.parametrize("model", ["simplenet", "resnet20"])
def test_plan_is_that_of_real_models(model):
    tuning = replace(TUNING, recipe=replace(TUNING.recipe, model=model))
    plan = make_plan(tuning, None, "cpu")
    assert plan == check_feasible(tuning, device="cpu")
    assert plan.impossible


@pytest.mark.parametrize(
    "tuning",
    [
        replace(TUNING, runs=0),
        replace(TUNING, norms=("ghost",), groups=(300,)),
        replace(TUNING, norms=("ghost",), groups=()),
        replace(TUNING, recipe=replace(TUNING.recipe, batch_size=5000)),
    ],
)
def test_plan_refuses_what_real_models_refuse(tuning):
    with pytest.raises(LandscapeError) as expected:
        check_feasible(tuning, device="cpu")
    with pytest.raises(LandscapeError) as actual:
        make_plan(tuning, None, "cpu")
    assert str(actual.value) == str(expected.value)


def test_plan_computes_nothing():
    devices = set()
    hook = register_module_forward_pre_hook(lambda module, inputs: devices.add(inputs[0].device.type))
    try:
        plan = make_plan(replace(TUNING, recipe=replace(TUNING.recipe, model="wrn-28-10")), None, "cpu")
    finally:
        hook.remove()
    assert devices == {"meta"}
    assert len(plan.tried()) > 5


def test_estimate_of_a_large_model_runs_no_whole_batch(monkeypatch):
    """A network whose smallest part of a batch takes longer than LONG_ENOUGH."""
    monkeypatch.setattr("landscape_cli.plan.LONG_ENOUGH", 0.0)
    batches = set()
    hook = register_module_forward_pre_hook(lambda module, inputs: batches.add(len(inputs[0])))
    try:
        seconds = seconds_per_training(make_plan(TUNING, None, "cpu"), None, "cpu")
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
        make_plan(TUNING, None, "meta")
    assert torch.get_default_device().type == "cpu"
