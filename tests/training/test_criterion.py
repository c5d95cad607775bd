from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from landscape import RECIPES, LandscapeError
from landscape.training.criterion import CRITERIA, check_outputs, correct, in_shape
from landscape.training.recipe import LOSSES, OPTIMIZERS

SLOW = {
    "mse": lambda outputs, targets: ((outputs - targets) ** 2).mean(),
    "l1": lambda outputs, targets: (outputs - targets).abs().mean(),
    "bce": lambda outputs, targets: (F.softplus(outputs) - outputs * targets).mean(),
}


@pytest.mark.parametrize("loss", SLOW)
def test_targets_are_not_broadcast(loss):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    targets = torch.rand(6, generator=generator)
    found = CRITERIA[loss]()(outputs, in_shape(loss, targets, outputs))
    torch.testing.assert_close(found, SLOW[loss](outputs[:, 0], targets.double()))


def test_names_are_torch():
    assert set(LOSSES) == set(CRITERIA)
    for name in OPTIMIZERS:
        assert issubclass(getattr(torch.optim, name), torch.optim.Optimizer)


def test_correct_predictions():
    assert correct("cross-entropy", torch.eye(3), torch.tensor([0, 1, 0])) == 2
    assert correct("bce", torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 0.0])) == 1
    assert correct("mse", torch.ones(2), torch.ones(2)).isnan()


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "message"),
    [
        ("cross-entropy", (4, 3, 5), (4,), r"\(4, classes\)"),
        ("cross-entropy", (4,), (4,), r"\(4, classes\)"),
        ("cross-entropy", (4, 2), (4,), "2 logits.*class 2"),
        ("mse", (4, 2), (4, 3), r"\(4, 2\).*\(4, 3\)"),
        ("mse", (3, 4), (4, 3), r"\(3, 4\)"),
    ],
)
def test_outputs_that_do_not_fit(loss, outputs, targets, message):
    recipe = replace(RECIPES["digits"], loss=loss)
    with pytest.raises(LandscapeError, match=message):
        check_outputs(recipe, torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64), 3)
    check_outputs(recipe, torch.zeros(4, 3, 5), torch.zeros((4, 5) if loss == "cross-entropy" else (4, 3, 5)), 3)


def test_outputs_that_are_no_tensor():
    with pytest.raises(LandscapeError, match="got tuple"):
        check_outputs(RECIPES["digits"], (torch.zeros(2, 3),), torch.zeros(2), 3)
