"""Norms as accelerators compute them, beside their equations."""

import pytest
import torch
from torch import nn

from benchmarks.launches import NORMS, count_norm
from landscape import GhostNorm, SeqNorm
from landscape.norms.functional import ghost_norm, seq_norm

SHAPES = [(12, 6), (14, 6), (12, 6, 4), (8, 6, 3, 5)]
LAYERS = {
    "ghost": lambda: GhostNorm(6, 4),
    "ghost interleaved": lambda: GhostNorm(6, 4, layout="interleaved"),
    "seq": lambda: SeqNorm(6, 4, 2),
}


def equations(name, x, weight, bias):
    """Return the layer's output by loops over groups."""
    if name == "seq":
        halves = [half.flatten(1) for half in x.chunk(2, 1)]
        scaled = [(h - h.mean(1, True)) / (h.var(1, False, keepdim=True) + 1e-5).sqrt() for h in halves]
        x = torch.cat([h.view_as(half) for h, half in zip(scaled, x.chunk(2, 1), strict=True)], 1)
    y, samples = torch.empty_like(x), torch.arange(len(x), device=x.device)
    parts = [samples[at::4] for at in range(4)] if "interleaved" in name else samples.tensor_split(4)
    dims, shape = [dim for dim in range(x.dim()) if dim != 1], (1, -1, *[1] * (x.dim() - 2))
    for part in parts:
        group = x[part]
        mean, var = group.mean(dims, True), group.var(dims, False, keepdim=True)
        y[part] = (group - mean) / (var + 1e-5).sqrt()
    return y * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_their_equations(name, shape, device):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.to(device)
    x, dy = torch.randn(2, *shape, dtype=torch.float64).to(device)
    found, expected = [], []
    for results, compute in ((found, layer), (expected, lambda x: equations(name, x, layer.weight, layer.bias))):
        given = x.clone().requires_grad_()
        y = compute(given)
        results += [y.detach(), *torch.autograd.grad(y, [given, layer.weight, layer.bias], dy)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_do_not_wait(name, device, forbids_waiting):
    layers = [LAYERS[name]().to(device), GhostNorm(6, 4, momentum=None).to(device)]
    x = torch.randn(12, 6, device=device, requires_grad=True)
    with forbids_waiting():
        for layer in layers:
            layer(x).sum().backward()
    assert all(layer.num_batches_tracked.item() == 1 for layer in layers)


def test_running_statistics_are_those_of_the_cpu(device):
    torch.manual_seed(0)
    x, states = torch.randn(12, 6, dtype=torch.float64), []
    for place in ("cpu", device):
        layer = GhostNorm(6, 4, momentum=None).double().to(place)
        for step in range(3):
            layer(x.to(place) + step)
        states.append({key: value.cpu() for key, value in layer.state_dict().items()})
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["GhostNorm", "GhostNorm, interleaved"])
def test_launches_of_norms(name, device):
    """Groups are channels of torch's batch normalization: a few launches more than it takes, however many groups."""
    counts, batch_norm = (count_norm(NORMS[one], str(device)) for one in (name, "nn.BatchNorm"))
    assert batch_norm["forward"] <= counts["forward"] <= batch_norm["forward"] + 9
    assert counts["forward + backward"] <= batch_norm["forward + backward"] + 16


@pytest.mark.parametrize("options", [(ghost_norm, 2), (seq_norm, 2, 2)])
def test_second_derivatives(options, device):
    functional, *groups = options
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64).to(device).requires_grad_()
    (dx,) = torch.autograd.grad(functional(x, *groups).pow(3).sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.square().sum(), x)
    host = x.detach().cpu().requires_grad_()
    (dx,) = torch.autograd.grad(functional(host, *groups).pow(3).sum(), host, create_graph=True)
    torch.testing.assert_close(found.cpu(), torch.autograd.grad(dx.square().sum(), host)[0], rtol=1e-9, atol=1e-9)
