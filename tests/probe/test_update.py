"""The ray of an update goes where the optimizer goes: one learning rate of SGD along it is its step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape import LandscapeProbe

GROUPS = {
    "one": [{"lr": 0.1}, {"lr": 0.1}],
    "two": [{"lr": 0.1}, {"lr": 0.02}],
    "first frozen": [{"lr": 0.0}, {"lr": 0.1}],
    "second frozen": [{"lr": 0.1}, {"lr": 0.0}],
    "ascent": [{"lr": 0.1, "maximize": True}, {"lr": 0.1, "maximize": True}],
    "ascent of one": [{"lr": 0.1, "maximize": True}, {"lr": 0.05}],
    "tensors": [{"lr": torch.tensor(0.1, dtype=torch.float64)}, {"lr": torch.tensor(0.02, dtype=torch.float64)}],
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("direction", ["gradient", "update"])
@pytest.mark.parametrize("engine", ["tape", "loop"])
def test_one_learning_rate_along_the_ray_is_the_step(groups, direction, engine):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()
    parts = [model[0].parameters(), model[2].parameters()]
    optimizer = torch.optim.SGD(
        [{"params": part, **group} for part, group in zip(parts, GROUPS[groups], strict=True)], lr=1.0
    )
    probe = LandscapeProbe(
        model, optimizer, criterion, step_sizes=[0.5, 1.0], relative=True, direction=direction, engine=engine
    )
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3
    with probe:
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            assert probe.last()["losses"][1] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)


def test_absolute_step_sizes_follow_an_ascent():
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 3).double(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1]) as probe:
        criterion(model(x), y).backward()
        optimizer.step()
    assert probe.last()["losses"] == [pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)]
    assert probe.last()["losses"][0] > probe.last()["loss"]
