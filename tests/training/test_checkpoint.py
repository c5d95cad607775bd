import io
import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from resuming import check_same

from landscape import RECIPES, LandscapeError, list_runs, read_traces, train
from landscape.distributed.group import SINGLE_PROCESS
from landscape.traces.writer import TraceWriter
from landscape.training import checkpoint
from landscape.training.checkpoint import Checkpoints
from landscape.training.experiment import Experiment
from landscape.training.target import TraceTarget
from landscape.training.train import _Training

SHORT = replace(RECIPES["digits"], train_samples=640, epochs=2)


class Stop(Exception):
    """Stops a training between two updates."""


def stop_at(step):
    def on_update(probe):
        if probe.step == step:
            raise Stop

    return on_update


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folder with a run that was stopped after 7 of its 10 updates."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stop):
        train(SHORT, out, device="cpu", on_update=stop_at(7))
    return out


@pytest.fixture
def begun(stopped, tmp_path):
    """Copy of ``stopped``."""
    return shutil.copytree(stopped, tmp_path / "begun")


def resume(out, recipe=SHORT, **options):
    return train(recipe, out, device="cpu", resume=True, **options)


def test_checkpoint_content(begun):
    content = torch.load(begun / SHORT.run_name / "checkpoint.pt", weights_only=True)
    assert content["recipe"]["step_sizes"] == list(SHORT.step_sizes)
    (state,) = content["ranks"]
    assert (state["epoch"], len(state["losses"])) == (2, 2)
    assert state["probe"]["written"] == {"updates": 7, "epochs": 1}
    assert len(read_traces(begun)) == 7


def test_resume_reads_old_names(begun):
    """Version 0.1 recorded the step sizes of the recipe as ``probe_lrs``."""
    run = begun / SHORT.run_name
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["recipe"]["probe_lrs"] = content["recipe"].pop("step_sizes")
    torch.save(content, run / "checkpoint.pt")
    facts = json.loads((run / "run.json").read_text())
    facts["probe_lrs"] = facts.pop("step_sizes")
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(LandscapeError, match="step_sizes="):
        resume(begun, replace(SHORT, step_sizes=(0.1,)))
    assert len(read_traces(resume(begun))) == 10


def test_resume_keeps_finished_run(begun):
    whole = resume(begun)
    assert not (whole / "checkpoint.pt").exists()
    before = {path: path.read_bytes() for path in whole.iterdir()}
    seen = []
    assert resume(begun, on_update=seen.append) == whole
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    # Another process may finish the run between the check and the lock.
    _Training(Experiment(SHORT, device="cpu"), TraceTarget(begun, resume=True)).run(seen.append)
    assert {path: path.read_bytes() for path in whole.iterdir() if path.name != "run.json"}.items() <= before.items()
    assert not seen


def test_resume_without_checkpoint_restarts(begun, tmp_path):
    (begun / SHORT.run_name / "checkpoint.pt").unlink()
    steps = []
    with pytest.warns(UserWarning, match="7 recorded updates"):
        parts = resume(begun, on_update=lambda probe: steps.append(probe.step))
    assert steps == list(range(1, 11))
    check_same(parts, train(SHORT, tmp_path / "whole", device="cpu"))


def test_empty_checkpoint(begun):
    (begun / SHORT.run_name / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(LandscapeError, match=r"checkpoint\.pt: is empty. Remove it"):
        resume(begun)
    assert len(read_traces(begun)) == 7


def test_stopped_run_has_no_end(begun):
    assert list_runs(begun).ended.isna().all()
    (begun / SHORT.run_name / "checkpoint.pt").unlink()
    assert list_runs(begun).ended.isna().all()


def test_resume_of_new_run(tmp_path):
    assert len(read_traces(resume(tmp_path))) == 10


def test_resume_of_locked_run(begun):
    message = f"process {os.getpid()} on host "
    with TraceWriter(begun / SHORT.run_name, resume=True), pytest.raises(LandscapeError, match=message):
        resume(begun)
    resume(begun)


@pytest.mark.filterwarnings("ignore:Left out")
def test_resume_of_damaged_run(begun):
    run = resume(begun)
    (run / "epochs-000000001.parquet").write_bytes(b"damaged")
    with pytest.raises(LandscapeError, match=r"damaged: .*epochs-000000001\.parquet.* Repair it"):
        resume(begun)
    assert len(read_traces(run)) == 10


def test_overwrite_removes_checkpoint(begun):
    with pytest.raises(LandscapeError, match=SHORT.run_name):
        train(SHORT, begun, device="cpu")
    changed = replace(SHORT, lr=0.1)

    def on_update(probe):
        assert not (begun / SHORT.run_name / "checkpoint.pt").exists()

    train(changed, begun, device="cpu", overwrite=True, on_update=on_update)
    assert set(read_traces(begun).lr) == {0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.1}, "lr=0.1: must be 0.4, .*Use .*another folder"),
        ({"epochs": 3}, "epochs=3: must be 2"),
        ({"engine": "loop"}, r"engine=loop: must be auto, .*checkpoint\.pt"),
        ({"step_sizes": (0.1,)}, "step_sizes=.*0.1.*: must be"),
    ],
)
def test_resume_with_other_settings(begun, changes, message):
    with pytest.raises(LandscapeError, match=message):
        resume(begun, replace(SHORT, **changes))
    resume(begun)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overwrite": True}, "resume=True with overwrite=True"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds=-1.0"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds=nan"),
    ],
)
def test_target_errors(tmp_path, options, message):
    with pytest.raises(LandscapeError, match=message):
        resume(tmp_path, **options)
    assert not list(tmp_path.iterdir())


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def zipped(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"hello", b"PK", zipped({"model": {}}), zipped([1]), pickle.dumps(Planted()), zipped(Planted())],
    ids=["text", "header", "another program's", "a list", "code", "code in a zip"],
)
def test_foreign_checkpoint_is_rejected(begun, content, monkeypatch):
    monkeypatch.chdir(begun)
    (begun / SHORT.run_name / "checkpoint.pt").write_bytes(content)
    with pytest.raises(LandscapeError, match=r"checkpoint\.pt: cannot be loaded .*Remove it"):
        resume(begun)
    assert not (begun / "planted").exists()
    assert len(read_traces(begun)) == 7


def test_flipped_bits_are_detected(begun):
    """Undetected bits are in names and dates of the zip archive, which are not read."""
    path, chance, refused = begun / SHORT.run_name / "checkpoint.pt", random.Random(0), 0
    content = path.read_bytes()
    with TraceWriter(begun / "other", {}) as trace:
        checkpoints = Checkpoints(begun / "other", trace, SHORT.resolve(), SINGLE_PROCESS, 60.0)
        states = []
        for _ in range(300):
            damaged = bytearray(content)
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            trace.write_file("checkpoint.pt", bytes(damaged))
            try:
                checkpoints.restore(lambda state: states.append(zipped(state)))
            except LandscapeError:
                refused += 1
    (expected,) = torch.load(path, weights_only=True)["ranks"]
    assert set(states) <= {zipped(expected)}
    assert refused > 250


def test_failed_write_keeps_previous_checkpoint(tmp_path, monkeypatch):
    """A folder in place of the temporary file stops root, too."""
    monkeypatch.setattr(checkpoint, "MAX_SHARE", 1e9)
    run = tmp_path / SHORT.run_name

    def on_update(probe):
        if probe.step == 3:
            (run / ".checkpoint.pt.tmp").mkdir()
        if probe.step == 6:
            raise Stop

    message = r"checkpoint\.pt: cannot be written \(.*\)"
    with pytest.warns(UserWarning, match=message) as caught, pytest.raises(Stop):
        train(SHORT, tmp_path, device="cpu", checkpoint_seconds=0, on_update=on_update)
    assert len(caught) == 1
    assert torch.load(run / "checkpoint.pt", weights_only=True)["ranks"][0]["probe"]["step"] == 2
    (run / ".checkpoint.pt.tmp").rmdir()
    check_same(resume(tmp_path), train(SHORT, tmp_path / "whole", device="cpu"))


def test_checkpoint_is_never_ahead_of_trace(tmp_path):
    run = tmp_path / SHORT.run_name

    def on_update(probe):
        if probe.step == 4:
            (run / ".updates-000000000.parquet.tmp").mkdir()
            raise Stop

    with (
        pytest.warns(UserWarning, match=SHORT.run_name) as caught,
        pytest.raises(Stop),
    ):
        train(SHORT, tmp_path, device="cpu", on_update=on_update)
    assert len(caught) == 2  # at the failed write, and for the lost rows at the end
    assert not (run / "checkpoint.pt").exists()


def test_slow_checkpoints_are_written_less_often(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARE", 0.5)
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(checkpoint, "time", clock)
    with TraceWriter(tmp_path / "run", {}) as trace:
        checkpoints = Checkpoints(tmp_path / "run", trace, SHORT.resolve(), SINGLE_PROCESS, 5.0)
        assert not checkpoints.due()
        clock.now = 5.0
        assert checkpoints.due()

        def state():
            clock.now += 20.0
            return {}

        checkpoints.save(state)
        clock.now = 25.0 + 39.0
        assert not checkpoints.due()
        clock.now = 25.0 + 40.0
        assert checkpoints.due()


def test_resume_keeps_overhead_budget(tmp_path):
    recipe = replace(SHORT, overhead=0.5, epochs=4)
    with pytest.raises(Stop):
        train(recipe, tmp_path, device="cpu", on_update=stop_at(12))
    before = torch.load(tmp_path / recipe.run_name / "checkpoint.pt", weights_only=True)["ranks"][0]["probe"][
        "schedule"
    ]
    run = resume(tmp_path, recipe)
    budget, frame = json.loads((run / "run.json").read_text())["budget"], read_traces(run)
    assert (budget["updates"], budget["probes"]) == (20, len(frame))
    assert budget["training_seconds"] > before["budget"]["training"] > 0
    assert budget["probing_seconds"] >= before["budget"]["probing"] > 0
    assert frame.step.is_monotonic_increasing
    assert frame.step.is_unique


def test_resume_during_autotuning(tmp_path):
    recipe = replace(SHORT, engine="auto")
    for step in (1, 2, 3):
        with pytest.raises(Stop):
            resume(tmp_path, recipe, on_update=stop_at(step))
    found = read_traces(resume(tmp_path, recipe))
    expected = read_traces(train(replace(SHORT, engine="loop"), tmp_path / "loop", device="cpu"))
    assert list(found.step) == list(expected.step)
    torch.testing.assert_close(torch.tensor(found.loss), torch.tensor(expected.loss), rtol=1e-3, atol=1e-4)
