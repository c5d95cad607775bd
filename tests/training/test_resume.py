"""A killed and resumed run has the trace of an uninterrupted one, bit for bit."""

import io
import os
import random
import re
import signal
import sys
import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from one_thread import _one_thread  # noqa: F401
from resuming import check_same, finish, kill_tree, process, start_probe, train_with_kills, wait_for_checkpoint
from torch import nn

from landscape import RECIPES, LandscapeError, LandscapeProbe, read_traces, train

LONG = bool(os.environ.get("LANDSCAPE_LONG"))
KILLS = 100 if LONG else 10
SHORT = replace(RECIPES["digits"], train_samples=640, epochs=2)
UPDATES = 10
STEPS = 12
SOAKED = [
    replace(SHORT, epochs=60, norm="ghost", schedule="cosine", momentum=0.9),
    replace(SHORT, epochs=60, norm="batch", every=2, weight_decay=1e-3),
    replace(SHORT, epochs=15, norm="seq", gradients=True),
    replace(SHORT, epochs=60, norm="none", engine="loop", schedule="triangle"),
]


class Stop(Exception):
    """Stops a training between two updates."""


def train_in_parts(recipe, out, *steps):
    """Train to each of the steps, resuming, and then to the end."""
    for last in steps:

        def on_update(probe, last=last):
            if probe.step == last:
                raise Stop

        with pytest.raises(Stop):
            train(recipe, out, device="cpu", resume=True, on_update=on_update)
        assert (out / recipe.run_name / "checkpoint.pt").exists()
    return train(recipe, out, device="cpu", resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "none", "engine": "loop"},
        {"norm": "ghost", "gradients": True},
        {"norm": "batch", "critical": True},
        {"norm": "seq", "every": 3},
        {"norm": "ghost", "groups": 4, "ghost_by": "accumulation"},
        {"schedule": "cosine", "momentum": 0.9, "nesterov": True},
        {"schedule": "triangle", "momentum": 0.9, "weight_decay": 1e-3},
        {"precision": "bfloat16", "validation": 300},
        {"model": "resnet20", "channels_last": True, "batch_size": 64, "train_samples": 320},
        pytest.param({"augment": ("crop", "flip", "cutout")}, id="augmented"),
    ],
    ids=str,
)
def test_resume_of_stopped_run(tmp_path, changes):
    """The stops are after the first update, within an epoch, at its end, after it, and at the end of the run."""
    recipe = replace(SHORT, **changes)
    whole = train(recipe, tmp_path / "whole", device="cpu")
    parts = train_in_parts(recipe, tmp_path / "parts", 1, 3, UPDATES // 2, UPDATES // 2 + 1, UPDATES)
    check_same(parts, whole)


@pytest.mark.multiprocess
def test_resume_of_killed_processes(tmp_path):
    chance, killed = random.Random(0), 0
    for number in range(KILLS):
        recipe = replace(SOAKED[number % len(SOAKED)], seed=number)
        began = time.monotonic()
        whole = process(recipe, tmp_path / "whole")
        whole.join()
        longest = (time.monotonic() - began) / 2
        assert whole.exitcode == 0
        killed += train_with_kills(recipe, tmp_path / "parts", tmp_path / "whole", longest, KILLS - killed, chance)
        if killed == KILLS:
            return
    pytest.fail(f"only {killed} processes could be killed")


@pytest.mark.multiprocess
def test_resume_after_signals(tmp_path):
    """SIGTERM, then SIGINT, then to the end; the same command trains the remaining runs, too."""
    options = ["--norm", "batch", "--norm", "none", "--epochs", "20", "--every", "2", "--checkpoint-seconds", "0.1"]
    run = tmp_path / "traces/digits-batch-seed0"
    messages = []
    for number, resume in ((signal.SIGTERM, []), (signal.SIGINT, ["--resume"])):
        started = start_probe(*options, *resume, out=run.parent)
        wait_for_checkpoint(run, started)
        started.send_signal(number)
        code, output, errors = finish(started)
        assert (code, output) == (128 + number, "")
        messages.append(errors.splitlines()[-1])
    stopped = [re.match(rf"Stopped by (\w+) after (\d+) updates.*{run}", message) for message in messages]
    assert [match[1] for match in stopped] == ["SIGTERM", "SIGINT"]
    assert 0 < int(stopped[0][2]) < int(stopped[1][2])
    assert ["--resume" in message for message in messages] == [True, False]
    code, output, errors = finish(start_probe(*options, "--resume", out=run.parent))
    assert code == 0, errors
    assert finish(start_probe(*options, "--resume", out=run.parent))[:2] == (
        0,
        "".join(f"{line} (already recorded)\n" for line in output.splitlines()[:2]) + output.splitlines()[2] + "\n",
    )
    for name in ("batch", "none"):
        whole = replace(RECIPES["digits"], norm=name, epochs=20, every=2)
        reference = process(whole, tmp_path / "whole")
        reference.join()
        check_same(run.parent / whole.run_name, tmp_path / "whole" / whole.run_name)


@pytest.mark.multiprocess
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes to kill in /proc")
def test_resume_of_killed_ranks(tmp_path):
    options = ["--norm", "ghost", "--groups", "2", "--ghost-by", "ranks", "--device", "cpu", "--resume"]
    options += ["--epochs", "20", "--checkpoint-seconds", "0"]
    run = tmp_path / "parts/digits-ghost2-ranks-seed0"
    started = start_probe(*options, out=run.parent)
    wait_for_checkpoint(run, started)
    kill_tree(started.pid)
    started.communicate()
    assert (run / "checkpoint.pt").exists()
    started = start_probe(*options, out=run.parent)
    wait_for_checkpoint(run, started)
    started.send_signal(signal.SIGTERM)
    code, _, errors = finish(started)
    assert code == 128 + signal.SIGTERM, errors
    assert errors.splitlines()[-1].startswith("Stopped by SIGTERM after ")
    assert "Traceback" not in errors
    assert finish(start_probe(*options, out=run.parent))[0] == 0
    assert finish(start_probe(*options, out=tmp_path / "whole"))[0] == 0
    check_same(run, tmp_path / "whole" / run.name)


# The first forward pass shows which parameters the model writes.
step_0_is_missing = pytest.mark.filterwarnings("ignore:Step 0 is not in the trace")


class Eventful(nn.Module):
    """Model with dropout, in-place writes, a moving average of a layer, and Python's RNG."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(12, 300), nn.Linear(300, 300), nn.BatchNorm1d(300)
        self.copy = deepcopy(self.first).requires_grad_(False)

    def forward(self, inputs):
        if self.training:
            with torch.no_grad():
                self.copy.weight.mul_(0.9).add_(0.1 * self.first.weight)
        hidden = F.relu(self.first(inputs), inplace=True) + self.copy(inputs)
        return self.norm(F.dropout(self.second(hidden), 0.3, self.training)) * (1 + random.random())


def own_loop(folder, steps, checkpoint=None, **options):
    """Train in a plain loop, from a checkpoint or from the beginning; return the checkpoint of a step."""
    torch.manual_seed(0)
    random.seed(0)
    model, criterion = Eventful(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = [(torch.randn(24, 12), torch.randint(16, (24,))) for _ in range(STEPS)]
    probe = LandscapeProbe(model, optimizer, criterion, step_sizes=[0.01, 0.1], trace=folder, resume=True, **options)
    with probe:
        if checkpoint:
            state = torch.load(io.BytesIO(checkpoint), weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            probe.load_state_dict(state["probe"])
            torch.set_rng_state(state["torch"])
            random.setstate(state["python"])
        for inputs, targets in data[probe.step : steps + 2]:  # Resuming removes the rows of two more steps.
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
            if probe.step == steps:
                file = io.BytesIO()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "probe": probe.state_dict()}
                torch.save(state | {"torch": torch.get_rng_state(), "python": random.getstate()}, file)
    return file.getvalue()


@step_0_is_missing
@pytest.mark.parametrize(
    "options",
    [
        {"engine": "loop"},
        {"engine": "auto"},
        {"engine": "auto", "direction": "update", "every": 2},
        {"engine": "auto", "gradients": True},
    ],
    ids=str,
)
def test_resume_of_plain_loop(tmp_path, options):
    own_loop(tmp_path / "whole/run", STEPS, **options)
    checkpoint = None
    for steps in (1, 2, 3, 4, 8, STEPS):
        checkpoint = own_loop(tmp_path / "parts/run", steps, checkpoint, **options)
    check_same(tmp_path / "parts/run", tmp_path / "whole/run")
    every = options.get("every", 1)
    first = every if options["engine"] == "loop" else 0
    assert list(read_traces(tmp_path / "parts/run").step) == [*range(first, STEPS, every)]


@step_0_is_missing
def test_resume_warns_of_other_threads(tmp_path):
    checkpoint = own_loop(tmp_path / "run", 2, engine="loop")
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match="1 threads.* 2"):
        own_loop(tmp_path / "run", 4, checkpoint, engine="loop")


@step_0_is_missing
def test_resume_without_rows(tmp_path):
    checkpoint = own_loop(tmp_path / "run", 4, engine="loop")
    with pytest.raises(LandscapeError, match="0 rows of updates"):
        own_loop(tmp_path / "elsewhere", 6, checkpoint, engine="loop")
