"""The progress bar of a training."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from landscape import RECIPES, LandscapeProbe, train
from landscape.training.progress import Progress

SHORT = replace(RECIPES["digits"], epochs=2, train_samples=256)


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress_of_train(tmp_path, capsys, progress, shown):
    steps = []
    train(SHORT, tmp_path, device="cpu", progress=progress, on_update=lambda probe: steps.append(probe.step))
    assert steps == [1, 2, 3, 4]
    printed = capsys.readouterr().err
    assert bool(printed) == shown
    assert ("4/4" in printed) == shown
    assert ("loss" in printed) == shown


@pytest.mark.parametrize("live", [True, False])
def test_range_in_the_progress_bar(capsys, monkeypatch, live):
    monkeypatch.setattr("landscape.training.progress.SECONDS", 0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = LandscapeProbe(model, optimizer, steps_per_epoch=5)
    with Progress(replace(SHORT, epochs=1), True, live=live) as bar, probe:
        for size in (1.0, 10.0, 100.0, 1.0, math.inf):
            optimizer.zero_grad()
            (size * model(torch.ones(2, 4))).square().mean().backward()
            optimizer.step()
            bar.update(probe)
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert ("!" in last and "▁" in last) == live


def test_progress_of_a_resumed_run(tmp_path, capsys):
    def stop(probe):
        if probe.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SHORT, tmp_path, device="cpu", on_update=stop)
    train(SHORT, tmp_path, device="cpu", resume=True, progress=True)
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert "4/4" in last
