"""Rows handed to functions, which may be slow or fail."""

import threading
import warnings

import pytest
import torch
from recordings import frame, rows
from torch import nn

from landscape import LandscapeError, LandscapeProbe, measured
from landscape.probe import sinks
from landscape.probe.sinks import SinkQueue, scalars_of


def train(probe, updates):
    generator = torch.Generator().manual_seed(probe.step)
    for _ in range(updates):
        probe.optimizers[0].zero_grad()
        probe.model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        probe.optimizers[0].step()


def make_probe(**options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return LandscapeProbe(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_scalars_are_those_of_the_frame():
    run = frame()
    found = scalars_of(rows())
    assert [row["step"] for row in found] == list(run["step"])
    for name in ("loss", "lr", "epoch", "slope", "loss_min", "loss_max"):
        assert [row[name] for row in found] == run[name].tolist()
    for measure in ("range", "lost_share", "sharpness", "beta"):
        assert [row[measure] for row in found] == measured(run, measure)[measure].tolist()
    assert [row["predictiveness"] for row in found] == run["gradient_distances"].map(max).tolist()


def test_unknown_numbers_are_left_out_but_not_a_lost_loss():
    nan = float("nan")
    (found,) = scalars_of([rows(1)[0] | {"epoch": nan, "loss": nan, "losses": [nan, 1.0, 2.0]}])
    assert "epoch" not in found
    assert {name for name, value in found.items() if value != value} == {"loss", "loss_min", "loss_max", "range"}


def test_rows_reach_all_sinks_in_order():
    seen, steps = [], []
    with make_probe(sinks=[seen.append, lambda row: steps.append(row["step"])], every=2) as probe:
        train(probe, 9)
    assert steps == [row["step"] for row in seen] == [0, 2, 4, 6, 8]
    assert [row["loss"] for row in seen] == probe.frame()["loss"].tolist()
    with probe:
        train(probe, 3)
    assert steps == [0, 2, 4, 6, 8, 10]


def test_sinks_are_flushed_and_not_part_of_the_run(tmp_path):
    class Sink(list):
        flushed = 0

        def __call__(self, row):
            self.append(row)

        def flush(self):
            self.flushed = len(self)

    sink = Sink()
    with make_probe(sinks=[sink], trace=tmp_path) as probe:
        train(probe, 3)
        assert "sinks" not in str(probe.state_dict())
    assert sink.flushed == 3
    assert "sinks" not in (tmp_path / "run.json").read_text()


def test_failing_sink_is_dropped_with_one_warning():
    def fail(row):
        calls.append(row["step"])
        raise OSError("no connection")

    calls, seen = [], []

    def run():
        with make_probe(sinks=[fail, seen.append]) as probe:
            train(probe, 3)
            probe.trace.flush()
            train(probe, 3)
        return probe

    with pytest.warns(UserWarning, match=r"fail failed \(OSError: no connection\)") as caught:
        probe = run()
    assert len(caught) == 1
    assert calls == [0]
    assert [row["step"] for row in seen] == list(probe.frame()["step"]) == [*range(6)]


def test_stuck_sink_ends_with_a_warning(monkeypatch):
    monkeypatch.setattr(sinks, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(sinks, "MAX_ROWS", 4)
    blocked, seen = threading.Event(), []

    def stuck(row):
        seen.append(row["step"])
        blocked.wait()

    def run():
        with make_probe(sinks=[stuck]) as probe:
            train(probe, 1)
            probe.trace.flush()
            while not seen:
                pass
            train(probe, 9)
        return probe

    with pytest.warns(UserWarning, match="missed 9 rows"):
        probe = run()
    assert len(probe.frame()) == 10
    blocked.set()
    assert seen == [0]


@pytest.mark.parametrize("saved", [2, 5])
def test_resumed_updates_are_not_handed_over_twice(tmp_path, saved):
    seen = []
    probe = make_probe(sinks=[seen.append], trace=tmp_path)
    with probe:
        train(probe, saved)
        state = probe.state_dict()
        train(probe, 5 - saved)
    resumed = make_probe(sinks=[seen.append], trace=tmp_path, resume=True)
    resumed.load_state_dict(state)
    with resumed:
        train(resumed, 8 - saved)
    assert [row["step"] for row in seen] == list(resumed.frame()["step"]) == [*range(8)]


def test_pending_rows_are_handed_over_once_and_kept():
    seen = []
    with make_probe(sinks=[seen.append]) as probe:
        train(probe, 3)
        probe.trace.resolve_pending()
        train(probe, 2)
    assert [row["step"] for row in seen] == list(probe.frame()["step"]) == [*range(5)]


def test_sink_with_an_age_gets_rows_during_training():
    class Sink(list):
        seconds = 0.0

        def __call__(self, row):
            self.append(row["step"])

    sink = Sink()
    with make_probe(sinks=[sink]) as probe:
        train(probe, 3)
        for feed in probe._sinks._feeds:
            feed.close(10)
        assert sink == [0, 1, 2]


def test_queue_without_sinks_starts_no_thread():
    before = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queue = SinkQueue()
        queue.put(rows(2))
        queue.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("given", [print, "print", [1], None])
def test_sinks_must_be_functions(given):
    with pytest.raises(LandscapeError, match="sinks="):
        make_probe(sinks=given)


def test_rows_are_not_fetched_for_sinks_that_wait():
    assert not SinkQueue().is_due
    assert not SinkQueue([print]).is_due
