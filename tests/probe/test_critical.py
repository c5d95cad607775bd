"""The search for the critical step in a training, against closed forms and a dense scan."""

import numpy as np
import pytest
import torch
from torch import nn

from landscape import LandscapeProbe, measured, ray_losses
from landscape.errors import LandscapeError

ENGINES = ["tape", "loop"]


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def train(probed=True, before=lambda model, inputs, targets, loss: None, updates=6, state=None, **options):
    """Train, and return the probe and all that training has changed."""
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    probe = LandscapeProbe(model, optimizer, criterion, **{"critical": True} | options)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        probe.load_state_dict(state["probe"])
    else:
        torch.manual_seed(1)
    if probed:
        probe.attach()
    else:
        probe.detach()
    for _ in range(updates):
        inputs, targets = torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,))
        optimizer.zero_grad()
        rng = torch.get_rng_state()
        loss = criterion(model(inputs), targets)
        loss.backward()
        after = torch.get_rng_state()
        torch.set_rng_state(rng)
        before(model, inputs, targets, loss.item())
        torch.set_rng_state(after)
        optimizer.step()
    found = {"probe": probe.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return probe, found | {"rng": torch.get_rng_state()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", ["gradient", "update"])
def test_training_keeps_every_bit(engine, direction):
    probe, with_probe = train(engine=engine, direction=direction)
    _, without = train(probed=False)
    assert probe.frame()["critical_losses"].map(len).between(1, 6).all()
    assert torch.equal(with_probe["rng"], without["rng"])
    for name, tensor in without["model"].items():
        assert torch.equal(tensor, with_probe["model"][name]), name
    for index, entry in without["optimizer"]["state"].items():
        assert torch.equal(entry["momentum_buffer"], with_probe["optimizer"]["state"][index]["momentum_buffer"])


@pytest.mark.parametrize("engine", ENGINES)
def test_dense_scan(engine):
    """The step is that of a fine scan, and far beyond the grid, where it is censored without the search."""
    expected = []

    def before(model, inputs, targets, loss):
        gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        low, high = 0.0, 100.0
        for _ in range(5):
            grid = np.linspace(low, high, 41)[1:]
            losses = ray_losses(model, lambda m: nn.functional.cross_entropy(m(inputs), targets), gradient, list(grid))
            first = np.flatnonzero(losses.numpy() >= loss)[0]
            low, high = grid[first - 1] if first else low, grid[first]
        expected.append(high)

    rows = train(before=before, engine=engine)[0].frame()
    found = measured(rows, "critical_step")
    assert found["critical_step_inside"].all()
    np.testing.assert_allclose(found["critical_step"], expected, rtol=0.02)
    without = measured(rows.drop(columns=["critical_step_sizes", "critical_losses"]), "critical_step")
    assert not without["critical_step_inside"].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_find_the_same_points(engine):
    expected, rows = train(engine="loop")[0].frame(), train(engine=engine)[0].frame()
    for column in ("critical_step_sizes", "critical_losses"):
        for row, other in zip(rows[column], expected[column], strict=True):
            np.testing.assert_allclose(row, other, rtol=1e-6)


@pytest.mark.parametrize("step_sizes", [[0.01, 0.02], [5.0], [-0.1, 0.1]])
def test_quadratic(step_sizes):
    """On ``theta'H theta / 2`` the critical step along the gradient g is ``2 |g|^2 / g'Hg``."""
    model = nn.Linear(3, 1, bias=False).double()
    hessian = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=0.1), []
    with LandscapeProbe(model, optimizer, critical=True, step_sizes=step_sizes) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            (hessian * model.weight**2).sum().div(2).backward()
            g = model.weight.grad
            expected.append(2 * (g**2).sum().item() / (hessian * g**2).sum().item())
            optimizer.step()
    rows = measured(measured(probe.frame(), "critical_step"), "critical_sharpness")
    np.testing.assert_allclose(rows["critical_step"], expected, rtol=1e-9)
    np.testing.assert_allclose(rows["critical_sharpness"], 2 / np.array(expected), rtol=1e-9)


def test_resume():
    whole = train(updates=6)[0].frame()
    _, state = train(updates=4)
    rest = train(updates=2, state=state)[0].frame()
    for column in ("critical_step_sizes", "critical_losses", "losses"):
        for row, other in zip(rest[column], whole[column][4:], strict=True):
            np.testing.assert_array_equal(row, other)
    with pytest.raises(LandscapeError, match="critical"):
        train(updates=1, state=state, critical=False)


def test_checkpoint_of_a_version_without_the_option():
    _, state = train(updates=2, critical=False)
    del state["probe"]["about"]["critical"]
    assert len(train(updates=1, state=state, critical=False)[0].frame()) == 1
