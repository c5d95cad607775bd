import io
import json
import os
import pickle
import random
import shutil
import time
from dataclasses import replace

import pytest
import torch
from resuming import check_same

from landscape import RECIPES, LandscapeError, list_runs, read_traces, train
from landscape.distributed.group import SINGLE_PROCESS
from landscape.traces.writer import TraceWriter
from landscape.training import checkpoint
from landscape.training.checkpoint import Checkpoints
from landscape.training.experiment import Experiment
from landscape.training.train import TraceTarget, _Training

SHORT = replace(RECIPES["digits"], train_samples=640, epochs=2)


class Stop(Exception):
    """What ends a training between two updates."""


def stop_at(step):
    def on_update(probe):
        if probe.step == step:
            raise Stop

    return on_update


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Traces with a run that was stopped after seven of its ten updates."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stop):
        train(SHORT, out, device="cpu", on_update=stop_at(7))
    return out


@pytest.fixture
def begun(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "begun")


def resume(out, recipe=SHORT, **options):
    return train(recipe, out, device="cpu", resume=True, **options)


def test_a_checkpoint_is_data_and_says_what_is_trained(begun):
    content = torch.load(begun / SHORT.run_name / "checkpoint.pt", weights_only=True)
    assert content["recipe"]["probe_lrs"] == list(SHORT.probe_lrs)
    (state,) = content["ranks"]
    assert (state["epoch"], len(state["losses"])) == (2, 2)
    assert state["probe"]["written"] == {"updates": 7, "epochs": 1}
    assert len(read_traces(begun)) == 7


def test_an_ended_run_stays_as_it_is(begun):
    whole = resume(begun)
    assert not (whole / "checkpoint.pt").exists()
    before = {path: path.read_bytes() for path in whole.iterdir()}
    seen = []
    assert resume(begun, on_update=seen.append) == whole
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    # Another process may have ended it just before this one has got hold of it.
    _Training(Experiment(SHORT, device="cpu"), TraceTarget(whole, False, True, 60.0)).run(seen.append)
    assert {path: path.read_bytes() for path in whole.iterdir() if path.name != "run.json"}.items() <= before.items()
    assert not seen


def test_without_a_checkpoint_a_run_starts_anew(begun, tmp_path):
    (begun / SHORT.run_name / "checkpoint.pt").unlink()
    steps = []
    with pytest.warns(UserWarning, match="There is no state to go on from: 7 recorded updates are replaced"):
        parts = resume(begun, on_update=lambda probe: steps.append(probe.step))
    assert steps == list(range(1, 11))
    check_same(parts, train(SHORT, tmp_path / "whole", device="cpu"))


def test_an_empty_checkpoint_is_a_damaged_one(begun):
    (begun / SHORT.run_name / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(LandscapeError, match=r"checkpoint\.pt is empty; remove it, and the run starts anew"):
        resume(begun)
    assert len(read_traces(begun)) == 7


def test_a_run_that_was_stopped_has_not_ended(begun):
    assert list_runs(begun).ended.isna().all()
    (begun / SHORT.run_name / "checkpoint.pt").unlink()
    assert list_runs(begun).ended.isna().all()


def test_a_run_that_was_not_begun_begins(tmp_path):
    assert len(read_traces(resume(tmp_path))) == 10


def test_a_run_that_is_being_written_is_let_alone(begun):
    message = f"is being written by process {os.getpid()} on host "
    with TraceWriter(begun / SHORT.run_name, resume=True), pytest.raises(LandscapeError, match=message):
        resume(begun)
    resume(begun)


@pytest.mark.filterwarnings("ignore:Left out")
def test_a_damaged_run_is_not_taken_for_an_unfinished_one(begun):
    run = resume(begun)
    (run / "epochs-000000001.parquet").write_bytes(b"damaged")
    with pytest.raises(LandscapeError, match=r"is damaged: .*epochs-000000001\.parquet .*Mend it, move it out"):
        resume(begun)
    assert len(read_traces(run)) == 10


def test_replacing_a_run_forgets_its_checkpoint(begun):
    with pytest.raises(LandscapeError, match="holds a run already"):
        train(SHORT, begun, device="cpu")
    changed = replace(SHORT, lr=0.1)

    def on_update(probe):
        assert not (begun / SHORT.run_name / "checkpoint.pt").exists()

    train(changed, begun, device="cpu", overwrite=True, on_update=on_update)
    assert set(read_traces(begun).lr) == {0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.1}, "was recorded with lr=0.4, and asked for is lr=0.1; give another folder"),
        ({"epochs": 3}, "epochs=2, and asked for is epochs=3"),
        ({"engine": "loop"}, r"checkpoint\.pt was recorded with engine=affine, and asked for is engine=loop"),
        ({"probe_lrs": (0.1,)}, "probe_lrs="),
    ],
)
def test_another_run_is_not_gone_on_with(begun, changes, message):
    with pytest.raises(LandscapeError, match=message):
        resume(begun, replace(SHORT, **changes))
    resume(begun)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overwrite": True}, "choose one of them"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds=-1.0 is out of range"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds=nan is out of range"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, options, message):
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
def test_a_foreign_file_is_refused_and_nothing_in_it_is_run(begun, content, monkeypatch):
    monkeypatch.chdir(begun)
    (begun / SHORT.run_name / "checkpoint.pt").write_bytes(content)
    with pytest.raises(
        LandscapeError, match=r"checkpoint\.pt cannot be gone on from .*; remove it, and the run starts anew"
    ):
        resume(begun)
    assert not (begun / "planted").exists()
    assert len(read_traces(begun)) == 7


def test_no_damage_goes_unnoticed(begun):
    """Bits of the file that are not compared are in names and dates that nobody reads."""
    path, chance, refused = begun / SHORT.run_name / "checkpoint.pt", random.Random(0), 0
    content = path.read_bytes()
    with TraceWriter(begun / "other", {}) as trace:
        kept = Checkpoints(begun / "other", trace, SHORT.resolve(), SINGLE_PROCESS, 60.0)
        states = []
        for _ in range(300):
            damaged = bytearray(content)
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            trace.write_file("checkpoint.pt", bytes(damaged))
            try:
                kept.restore(lambda state: states.append(zipped(state)))
            except LandscapeError:
                refused += 1
    (expected,) = torch.load(path, weights_only=True)["ranks"]
    assert set(states) <= {zipped(expected)}
    assert refused > 250


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """A folder is in the way, which stops the superuser too."""
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    run = tmp_path / SHORT.run_name

    def on_update(probe):
        if probe.step == 3:
            (run / ".checkpoint.pt.tmp").mkdir()
        if probe.step == 6:
            raise Stop

    message = r"checkpoint\.pt cannot be written \(.*\); training goes on"
    with pytest.warns(UserWarning, match=message) as told, pytest.raises(Stop):
        train(SHORT, tmp_path, device="cpu", checkpoint_seconds=0, on_update=on_update)
    assert len(told) == 1
    assert torch.load(run / "checkpoint.pt", weights_only=True)["ranks"][0]["probe"]["step"] == 2
    (run / ".checkpoint.pt.tmp").rmdir()
    check_same(resume(tmp_path), train(SHORT, tmp_path / "whole", device="cpu"))


def test_a_checkpoint_is_never_ahead_of_the_trace(tmp_path):
    run = tmp_path / SHORT.run_name

    def on_update(probe):
        if probe.step == 4:
            (run / ".updates-000000000.parquet.tmp").mkdir()
            raise Stop

    with (
        pytest.warns(UserWarning, match="cannot be written to: .*; training goes on"),
        pytest.warns(UserWarning, match="Not all that was recorded"),
        pytest.raises(Stop),
    ):
        train(SHORT, tmp_path, device="cpu", on_update=on_update)
    assert not (run / "checkpoint.pt").exists()


def test_dear_checkpoints_are_rarer(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE", 0.5)
    with TraceWriter(tmp_path / "run", {}) as trace:
        kept = Checkpoints(tmp_path / "run", trace, SHORT.resolve(), SINGLE_PROCESS, 0.05)
        assert not kept.due()
        time.sleep(0.06)
        assert kept.due()

        def state():
            time.sleep(0.2)
            return {}

        kept.keep(state)
        time.sleep(0.25)
        assert not kept.due()
        time.sleep(0.3)
        assert kept.due()


def test_what_was_paid_for_probes_is_remembered(tmp_path):
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


def test_engines_that_are_still_being_compared(tmp_path):
    recipe = replace(SHORT, engine="auto")
    for step in (1, 2, 3):
        with pytest.raises(Stop):
            resume(tmp_path, recipe, on_update=stop_at(step))
    found = read_traces(resume(tmp_path, recipe))
    expected = read_traces(train(replace(SHORT, engine="loop"), tmp_path / "loop", device="cpu"))
    assert list(found.step) == list(expected.step)
    torch.testing.assert_close(torch.tensor(found.loss), torch.tensor(expected.loss), rtol=1e-3, atol=1e-4)
