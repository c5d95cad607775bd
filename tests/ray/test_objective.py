import random

import numpy as np
import pytest
import torch
from torch import nn

from landscape.ray.loss_module import ForwardTraits, LossModule
from landscape.ray.objective import LossTerm, Objective
from landscape.ray.snapshot import Autocast, ForwardSnapshot


class Restless(nn.Module):
    """Draws from every RNG, and rebinds a buffer instead of writing to it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)

    def forward(self):
        self.count = self.count + 1
        self.unsaved += 1
        noise = random.random() + np.random.rand() + torch.rand(()) + float(self.training)  # noqa: NPY002
        return self.scale * noise * self.count * self.unsaved


def seed(value):
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    torch.manual_seed(value)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def test_call_changes_nothing_and_is_repeatable():
    model = Restless()
    seed(0)
    objective = Objective.of(model, lambda model: model())
    model.eval()
    seed(1)
    expected = draw()
    seed(1)
    count, unsaved = model.count, model.unsaved
    losses = [objective({"scale": torch.tensor(2.0)}) for _ in range(3)]
    assert draw() == expected
    assert model.count is count
    assert model.unsaved is unsaved
    assert (count, unsaved, model.scale) == (0, 0, 1)
    assert not model.training
    seed(0)
    model.train()
    assert [loss.item() for loss in losses] == [pytest.approx(2 * model().item(), rel=1e-6)] * 3


def test_missing_parameters_stay():
    model = nn.Linear(2, 1)
    objective = Objective.of(model, lambda model: model(torch.ones(2)))
    loss = objective({"weight": torch.zeros(1, 2)})
    assert loss.item() == model.bias.item()


def test_train_flags_of_the_forward_pass():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    model[1].eval()
    modes = []
    model.register_forward_hook(lambda *_: modes.append([module.training for module in model.modules()]))
    objective = Objective.of(model, lambda model: model(torch.ones(4, 3)).sum())
    model.eval()
    objective({})
    assert modes == [[True, True, False]]
    assert [module.training for module in model.modules()] == [False, False, False]


def test_train_flags_restored_after_error():
    model = nn.Dropout(0.5)
    objective = Objective.of(model, lambda model: 1 / 0)
    model.eval()
    with pytest.raises(ZeroDivisionError):
        objective({})
    assert not model.training


def test_autocast_of_the_forward_pass():
    model, inputs = nn.Linear(8, 1), torch.randn(4, 8)
    dtypes = []

    def closure(model):
        outputs = model(inputs)
        dtypes.append(outputs.dtype)
        return outputs.float().sum()

    plain = Objective.of(model, closure)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = Objective.of(model, closure)
        plain({})
    reduced({})
    assert dtypes == [torch.float32, torch.bfloat16]
    assert Autocast.capture(["cpu"]) == (Autocast("cpu", False, torch.bfloat16),)


def test_terms_are_weighted():
    loss_module = LossModule(nn.Linear(1, 1))
    losses, weights = (3.0, 5.0), (torch.tensor(0.5), None)
    terms = [
        LossTerm(
            lambda model, loss=loss: torch.tensor(loss),
            ForwardSnapshot.capture(loss_module),
            torch.tensor(loss),
            weight,
        )
        for loss, weight in zip(losses, weights, strict=True)
    ]
    assert Objective(terms)({}) == Objective(terms).training_loss() == 6.5


def test_traits_survive_a_checkpoint():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    saved = ForwardTraits({id(model[0].weight)}, True, True)
    state, loaded = saved.state_dict(model), ForwardTraits()
    loaded.load_state_dict(state, model)
    assert state["written_parameters"] == ["0.weight"]
    assert loaded == saved


def test_traits_of_an_old_checkpoint():
    model, traits = nn.Linear(2, 3), ForwardTraits()
    traits.load_state_dict({"moving": ["bias"], "draws": True, "streamed": [], "shared": ["weight"]}, model)
    assert traits == ForwardTraits({id(model.bias)}, True)
