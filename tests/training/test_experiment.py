from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from landscape import RECIPES, LandscapeError
from landscape.training.experiment import Experiment, learning_rate

DIGITS = replace(RECIPES["digits"], epochs=2, precision="float64")


def rates(updates, **changes):
    recipe = replace(RECIPES["cifar10"], **changes).resolve()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr)
    schedule, seen = learning_rate(recipe, optimizer, updates), []
    for _ in range(updates):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_triangle_schedule():
    seen = rates(201)
    assert (seen[0], seen[-1]) == pytest.approx((0.1, 1e-4))
    assert max(seen) == pytest.approx(3.0, rel=0.01)
    top = seen.index(max(seen))
    assert top == pytest.approx(0.45 * 200, abs=1)
    assert seen[2 * top] == pytest.approx(0.1, abs=0.05)
    steps = [b - a for a, b in pairwise(seen)]
    assert steps[:top] == pytest.approx([steps[0]] * top)
    assert steps[top + 1 : 2 * top - 1] == pytest.approx([-steps[0]] * (top - 2))


def test_lr_without_norm():
    assert max(rates(201, norm="none")) == pytest.approx(1.0, rel=0.01)
    assert max(rates(201, norm="none", lr=2.0, lr_without_norm=None)) == pytest.approx(2.0, rel=0.01)


def test_cosine_schedule():
    seen = rates(200, schedule="cosine", lr=0.4, rise=0.025, lr_end=0.0)
    assert seen[:6] == pytest.approx([0.1, 0.16, 0.22, 0.28, 0.34, 0.4])
    for update in (5, 50, 120, 199):
        share = torch.tensor((update - 5) / 195 * torch.pi)
        assert seen[update] == pytest.approx(0.2 * (1 + share.cos().item()), rel=1e-3)


@pytest.mark.parametrize("schedule", ["triangle", "cosine", "constant"])
@pytest.mark.parametrize("updates", [1, 2, 3, 7])
def test_schedule_of_few_updates(schedule, updates):
    assert all(0 <= rate <= 3 for rate in rates(updates, schedule=schedule))


def losses(recipe, epochs=1):
    experiment = Experiment(recipe)
    seen = torch.stack([loss for _ in range(epochs) for loss in experiment.epoch()])
    return seen, dict(experiment.model.named_parameters())


@pytest.mark.parametrize("groups", [4, 7])
def test_accumulation_equals_layer(groups):
    """Groups have equal and unequal sizes; test_ghost_by covers ranks, too."""
    ghost = replace(DIGITS, norm="ghost", groups=groups, momentum=0.9)
    (direct, ours), (summed, theirs) = losses(ghost), losses(replace(ghost, ghost_by="accumulation"))
    torch.testing.assert_close(direct, summed, rtol=1e-9, atol=1e-9)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-8, atol=1e-9)


def test_experiment_has_settings_of_recipe():
    changes = {"train_samples": 640, "validation": 100, "weight_decay": 0.01, "nesterov": True, "momentum": 0.8}
    experiment = Experiment(replace(RECIPES["digits"], **changes))
    assert (len(experiment.data.train), len(experiment.data.validation), experiment.updates) == (640, 100, 5)
    group = experiment.optimizer.param_groups[0]
    assert (group["weight_decay"], group["nesterov"], group["momentum"], group["lr"]) == (0.01, True, 0.8, 0.4)
    assert len(list(experiment.epoch())) == 5


def test_precisions_agree():
    single, _ = losses(RECIPES["digits"])
    double, parameters = losses(DIGITS)
    reduced, masters = losses(replace(RECIPES["digits"], precision="bfloat16"))
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float64}
    assert {parameter.dtype for parameter in masters.values()} == {torch.float32}
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reduced.double(), double, rtol=0.05, atol=0.05)
    assert not torch.equal(reduced, single)


def test_channels_last_keeps_losses():
    recipe = replace(DIGITS, model="resnet20", norm="ghost", train_samples=256)
    (plain, _), (last, parameters) = losses(recipe), losses(replace(recipe, channels_last=True))
    torch.testing.assert_close(plain, last, rtol=1e-9, atol=0)
    assert parameters["layers.3.layers.0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_evaluate_equals_definition():
    experiment = Experiment(DIGITS)
    loss, accuracy = experiment.evaluate(experiment.data.test)
    logits = experiment.model.eval()(experiment.data.test.inputs.double())
    expected = [
        -row.log_softmax(0)[target].item() for row, target in zip(logits, experiment.data.test.targets, strict=True)
    ]
    right = [row.argmax() == target for row, target in zip(logits, experiment.data.test.targets, strict=True)]
    assert (loss, accuracy) == pytest.approx((sum(expected) / 297, sum(map(int, right)) / 297))
    nothing = experiment.evaluate(experiment.data.validation)
    assert all(value != value for value in nothing)


def test_augmentation_depends_on_seed():
    recipe = replace(RECIPES["digits"], augment=("crop", "flip", "cutout"))
    first, second = losses(recipe)[0], losses(recipe)[0]
    assert torch.equal(first, second)
    assert not torch.equal(first, losses(RECIPES["digits"])[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_samples": 100}, "batch_size=128: .*100 training samples"),
        ({"train_samples": 1400, "validation": 101}, "validation=101.* 1500"),
        ({"norm": "ghost", "groups": 100, "ghost_by": "accumulation"}, "cannot normalize batches of 128"),
        ({"ghost_by": "accumulation"}, "ghost_by='accumulation': requires norm='ghost', got norm='batch'"),
        ({"model": "resnet"}, "model='resnet': unknown model"),
    ],
)
def test_experiment_errors(changes, message):
    with pytest.raises(LandscapeError, match=message):
        Experiment(replace(RECIPES["digits"], **changes))


@pytest.mark.parametrize("rise", [0.1, 0.2, 0.25, 0.45])
@pytest.mark.parametrize("updates", [1, 2, 4, 5, 10, 40])
@pytest.mark.parametrize("lr", [0.01, 3.0])
@pytest.mark.parametrize("schedule", ["triangle", "cosine"])
def test_schedule_never_exceeds_lr(schedule, lr, updates, rise):
    assert max(rates(updates, schedule=schedule, rise=rise, lr=lr, lr_end=0.0)) <= lr * (1 + 1e-9)
