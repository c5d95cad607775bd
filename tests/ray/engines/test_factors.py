"""Products with factors of a gradient equal those with moved weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape.ray.engines.loop import loop
from landscape.ray.engines.recorder import Recorder
from landscape.ray.engines.replay import Replay
from landscape.ray.engines.tape import tape as evaluate
from landscape.ray.loss_module import LossModule
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray

STEP_SIZES = (0.0, 0.1, -0.05, 0.7)
SHAPES = {"both wide": (4, 96, 80), "few inputs": (2, 10, 90), "few outputs": (3, 200, 8)}


class Wide(nn.Module):
    """Two linear layers, of a constant and of a moving input, with products of other kinds."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.first, self.second = nn.Linear(n_in, n_in), nn.Linear(n_in, n_out)
        self.bare, self.norm = nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_in)
        self.plain = nn.Parameter(torch.randn(n_in, n_out) / 4)
        self.double()

    def forward(self, x):
        hidden = self.norm(self.first(x)).relu()
        shift = torch.ones(len(x), self.plain.shape[1], dtype=x.dtype)
        products = hidden @ self.plain + torch.addmm(shift, hidden, self.plain)
        return self.second(hidden).relu_() + self.bare(hidden).mul_(2).tanh() + products


def recorded(model, x, changed=lambda x: x):
    """Return a tape and the gradient of a squared loss."""
    recorder = Recorder(dict(model.named_parameters()))
    with recorder.recording():
        loss = model(changed(x)).square().mean()
    root = recorder.add_root([loss], [None])
    gradient = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True))
    return recorder.tape([root], LossModule(model), loss.detach()), gradient


def rays(model, x, tape, direction):
    """Return the losses by the tape and by the loop."""
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    objective = Objective.of(model, lambda model: model(x).square().mean(), direction)
    return [f(Ray(one, origin, direction, STEP_SIZES)) for f, one in ((evaluate, tape), (loop, objective))]


def is_together(model, tape, direction):
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        return Replay(tape, origin, direction)._is_together


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", ["first", "second", "bias", ""])
def test_losses_equal_the_loops(shape, kept):
    torch.manual_seed(0)
    rows, *sizes = SHAPES[shape]
    model, x = Wide(*sizes), torch.randn(rows, sizes[0], dtype=torch.float64)
    tape, gradient = recorded(model, x)
    direction = {name: part for name, part in gradient.items() if not kept or kept not in name}
    found, expected = rays(model, x, tape, direction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert shape != "both wide" or is_together(model, tape, direction)


INPUTS = {
    "equal rows": lambda x: x[:1].expand(len(x), -1).clone() + 0 * x,
    "zeros": lambda x: torch.zeros_like(x),
    "a constant border": lambda x: F.pad(x[:, 20:-20], (20, 20)),
    "of rank one": lambda x: x[:, :1] * x[:1],
}


@pytest.mark.parametrize("kind", INPUTS)
def test_awkward_inputs_make_no_difference(kind):
    torch.manual_seed(0)
    model = Wide(96, 80)
    x = INPUTS[kind](torch.randn(4, 96, dtype=torch.float64))
    tape, gradient = recorded(model, x)
    found, expected = rays(model, x, tape, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


CHANGES = {
    "noise": lambda part, k: part + 1e-6 * torch.randn_like(part),
    "clipped by value": lambda part, k: part.clamp(-1e-4, 1e-4),
    "another direction": lambda part, k: torch.randn_like(part),
    "one element": lambda part, k: part.index_put((torch.tensor(1),), torch.tensor(2.0, dtype=part.dtype)),
    "one column": lambda part, k: part * (torch.arange(part.shape[-1]) != 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_directions_without_factors_are_taken_as_they_are(change):
    torch.manual_seed(0)
    model, x = Wide(96, 80), torch.randn(4, 96, dtype=torch.float64)
    tape, gradient = recorded(model, x)
    direction = {name: CHANGES[change](part, name) for name, part in gradient.items()}
    assert not is_together(model, tape, direction)
    found, expected = rays(model, x, tape, direction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_scaled_gradient_keeps_its_factors():
    model, x = Wide(96, 80), torch.randn(4, 96, dtype=torch.float64)
    tape, gradient = recorded(model, x)
    assert is_together(model, tape, {name: -0.01 * part for name, part in gradient.items()})


def test_a_diverged_layer_is_left_to_itself():
    model, x = Wide(96, 80), torch.full((4, 96), torch.inf, dtype=torch.float64)
    tape, gradient = recorded(model, x)
    found, expected = rays(model, x, tape, gradient)
    assert found.isnan().all()
    assert expected.isnan().all()


def test_a_bias_written_before_its_use_is_not_that_of_the_origin():
    torch.manual_seed(0)
    model, x = nn.Linear(96, 80).double(), torch.randn(4, 96, dtype=torch.float64)
    origin = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    recorder = Recorder({**dict(model.named_parameters()), "scale": scale})
    with recorder.recording(), recorder.inside():
        with torch.no_grad():
            model.bias.mul_(0.5)
        loss = model(x * scale).square().mean()
    root = recorder.add_root([loss], [None])
    tape = recorder.tape([root], LossModule(model), loss.detach())
    direction = {"weight": torch.randn(80, 4, dtype=torch.float64) @ x}
    (found,) = Replay(tape, {**origin, "scale": scale.detach()}, direction).losses([0.1])
    expected = F.linear(x, origin["weight"] - 0.1 * direction["weight"], origin["bias"] / 2).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
