"""Tests that the benchmarks run and detect side effects; nothing is timed."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import components, coverage, launches, overhead, rays, trace_store
from benchmarks.charts import draw_rays
from benchmarks.methods import METHODS, Method, Workbench
from benchmarks.side_effects import SideEffects
from benchmarks.workloads import BARE, PROBE, PROBED, UNPROBED, WORKLOADS, Workload
from landscape import LandscapeProbe


def batch():
    return torch.randn(8, 6), torch.randint(3, (8,))


def layers(*between):
    return lambda: nn.Sequential(nn.Linear(6, 5), *between, nn.Linear(5, 3))


TINY = Workload("tiny", "two layers", layers(nn.BatchNorm1d(5), nn.ReLU()), batch, 3, goal=0.5)
DROPOUT = replace(TINY, name="dropout", model=layers(nn.Dropout(0.5)))


def run_once(name, workload):
    return rays.run_once(next(method for method in METHODS if method.name == name), Workbench(workload, "cpu"))


@pytest.fixture(scope="module")
def table():
    return rays.measure(TINY, 1, "cpu")


def test_rays_rows(table):
    assert set(table.index) == {method.name for method in METHODS} | {PROBE, f"{PROBE} with criterion"}
    assert table.index[0] == BARE
    assert table.loc[BARE, "ratio"] == 1
    assert table["goal"].dropna().to_dict() == {PROBE: 0.5}
    assert set(table.index[table.ms.isna()]) - {"loss-landscapes"} == {"vmap"}


def test_rays_side_effects(table):
    assert set(table.leaves[["landscape, loop", "landscape, tape", PROBE]]) == {"nothing"}
    assert table.leaves[BARE] == "buffers moved"
    assert table.leaves["in-place loop"].endswith("buffers moved")
    assert table.leaves["deepcopy per point"] == "nothing"


def test_rays_agreement_with_loop(table):
    agree = ["landscape, tape", PROBE, f"{PROBE} with criterion", "in-place loop", "deepcopy per point"]
    assert (table.differs[agree] < 1e-5).all()
    assert table.differs["loop of PyHessian's tutorial"] > 1e-3
    assert np.isnan(table.differs[BARE])


def test_components():
    parts = components.measure(TINY, 1)
    assert set(parts) == {"calls", *components.PARTS, "probe", "gradients"}
    assert parts["calls"] > 5


def test_launches_of_operators_and_views():
    library = torch.library.Library("landscape", "FRAGMENT")
    library.define("twice_sine(Tensor x) -> Tensor")
    library.impl("twice_sine", lambda x: torch.empty_like(x).copy_(x.sin().t().t()) * 2, "CompositeExplicitAutograd")
    with launches.Launches("cpu") as mode:
        torch.ops.landscape.twice_sine(torch.eye(2).view(4, 1))
    assert mode.counts == {f"aten.{name}": 1 for name in ("eye.default", "copy_.default", "sin.default", "mul.Tensor")}
    with launches.Launches("cuda") as mode:
        torch.ones(2)
    assert mode.total == 0


def test_launches_are_counted_no_longer_than_asked():
    """Also if a probe that was never detached records on."""
    model, criterion = nn.Linear(2, 2), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = LandscapeProbe(model, optimizer, step_sizes=[0.1]).attach()
    with launches.Launches("cpu") as mode:
        criterion(model(torch.ones(3, 2)), torch.ones(3, 2)).backward()
        optimizer.step()
    before = mode.total
    assert torch.ones(2).sum() == 2
    assert mode.total == before > 0
    probe.detach()


def test_launches_of_update():
    wide = replace(TINY, model=layers(*[layer for _ in range(5) for layer in (nn.BatchNorm1d(5), nn.Linear(5, 5))]))
    tiny, large = (launches.count_update(workload, None, "cpu") for workload in (TINY, wide))
    # Linear, BatchNorm (its counter, and all else), ReLU, Linear, log-softmax, the loss.
    assert (tiny["forward"], tiny["step"], tiny["K passes"]) == (7, 1, 21)
    assert large["K passes"] > 40
    # The loop itself takes as many, however many parameters and buffers there are.
    assert tiny["probe, loop"] - tiny["K passes"] == large["probe, loop"] - large["K passes"] < 42


@pytest.mark.parametrize("name", launches.NORMS)
def test_launches_of_norms(name):
    counts = launches.count_norm(launches.NORMS[name], "cpu")
    assert 2 <= counts["forward"] < counts["forward + backward"] < 50


def test_launches_command(tmp_path, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "simplenet-none", TINY)
    options = ["--workload", "simplenet-none", "--json", str(tmp_path / "launches.json")]
    result = CliRunner().invoke(launches.main, options, catch_exceptions=False)
    assert "probe, loop" in result.output
    assert "GhostNorm, interleaved" in result.output
    rows = json.loads((tmp_path / "launches.json").read_text())["rows"]
    assert {"name": "simplenet-none", "part": "K passes", "launches": 21, "device": "cpu"} in rows


def test_loss_landscapes_same_points():
    pytest.importorskip("loss_landscapes")
    found = run_once("loss-landscapes", TINY)
    expected = run_once("landscape, loop", TINY)
    assert found.leaves == "nothing"
    assert found.differs(expected.losses) < 1e-5


def test_dropout_mask_differs_between_points():
    found, expected = run_once("deepcopy per point", DROPOUT), run_once("landscape, loop", DROPOUT)
    assert found.leaves == "torch's RNG advanced"
    assert found.losses[0] == expected.losses[0]
    assert found.differs(expected.losses) > 1e-3
    assert "random" in run_once("vmap", DROPOUT).note


SIDE_EFFECTS = {
    "weights moved": lambda workbench: workbench.model[0].weight.data.mul_(1 + 1e-6),
    "gradients changed": lambda workbench: workbench.optimizer.zero_grad(),
    "buffers moved": lambda workbench: workbench.model[1].running_var.add_(1),
    "train flags changed": lambda workbench: workbench.model[1].eval(),
    "requires_grad changed": lambda workbench: workbench.model[0].bias.requires_grad_(False),
    "torch's RNG advanced": lambda workbench: torch.rand(()),
    "numpy's RNG advanced": lambda workbench: np.random.rand(),  # noqa: NPY002
    "Python's RNG advanced": lambda workbench: random.random(),
    "nothing": lambda workbench: None,
}


@pytest.mark.parametrize("description", SIDE_EFFECTS)
def test_side_effect_is_detected(description):
    def run(workbench):
        SIDE_EFFECTS[description](workbench)
        return torch.ones(3)

    assert rays.run_once(Method("with a side effect", run), Workbench(TINY, "cpu")).leaves == description


def test_side_effects_restore():
    workbench = Workbench(TINY, "cpu")
    for change in SIDE_EFFECTS.values():
        change(workbench)
    assert len(workbench.start.changes(SideEffects.snapshot(workbench.model))) == len(SIDE_EFFECTS) - 1
    workbench.start.restore(workbench.model)
    assert workbench.start.changes(SideEffects.snapshot(workbench.model)) == []


def test_side_effects_nan_and_signed_zero():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, torch.nan)
    nn.init.zeros_(model.bias)
    before = SideEffects.snapshot(model)
    assert before.changes(SideEffects.snapshot(model)) == []
    nn.init.constant_(model.bias, -0.0)
    assert before.changes(SideEffects.snapshot(model)) == ["weights moved"]


def test_rays_base_and_judged_row():
    table = rays.measure(replace(TINY, judged=PROBED, base=UNPROBED), 1, "cpu")
    assert table.loc[UNPROBED, "ratio"] == 1
    assert list(table.index[table.goal.notna()]) == [PROBED]


def test_rays_bfloat16():
    table = rays.measure(replace(TINY, autocast=torch.bfloat16), 1, "cpu")
    assert table.leaves[PROBE] == "nothing"
    assert table.differs["in-place loop"] == 0


def test_rays_command(tmp_path, monkeypatch):
    cuda = replace(TINY, name="on cuda", cuda=True)
    monkeypatch.setitem(WORKLOADS, "cuda-simplenet", cuda)
    monkeypatch.setitem(WORKLOADS, "mlp", TINY)
    options = ["--workload", "mlp", "--workload", "cuda-simplenet", "--rounds", "1", "--threads", "1"]
    outputs = ["--json", str(tmp_path / "rays.json"), "--chart", str(tmp_path / "rays.png")]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(rays.main, options + outputs, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0
    assert "on cuda: skipped" in result.output
    assert "weights moved" in result.output or "buffers moved" in result.output
    written = json.loads((tmp_path / "rays.json").read_text())
    assert {"machine", "versions", "rows"} == set(written)
    assert {row["workload"] for row in written["rows"]} == {"tiny"}
    assert (tmp_path / "rays.png").stat().st_size > 10_000


def test_rays_chart(table):
    (axes,) = draw_rays({"tiny": table}).axes
    words = [text.get_text() for text in axes.texts]
    assert "goal 0.5" in words
    assert "fails" in words
    assert BARE not in [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))
def test_workload_forward_pass(workload):
    model, (inputs, targets) = workload.model(), workload.batch()
    few = 48 if "ghost" in workload.name else 4
    with torch.no_grad():
        outputs = model(inputs[:few])
    assert len(outputs) == len(targets) * few // len(inputs)
    assert outputs.isfinite().all()


def test_overhead():
    table, same_ends = overhead.measure((0.5,), 3, 1)
    assert same_ends
    assert list(table.index) == [0.5]
    assert (table.probes >= 1).all()
    assert (table.recorded > 0).all()


def test_trace_store_tasks(tmp_path):
    for task, run in (trace_store.WRITE | trace_store.READ).items():
        cost = run(tmp_path, 2000)
        assert cost["seconds"] >= 0
        if "worst_ms" in cost:
            assert cost["us_per_row"] == pytest.approx(cost["seconds"] / 2000 * 1e6), task
            assert 0 < cost["worst_ms"] < cost["seconds"] * 1e3
    assert len(list((tmp_path / "run").glob("*.parquet"))) == 2
    assert len(list((tmp_path / "many").iterdir())) == 2


def test_trace_store_command(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_store, "WRITE", {task: trace_store.WRITE[task] for task in ["append: TraceWriter"]})
    monkeypatch.setattr(trace_store, "READ", {task: trace_store.READ[task] for task in ["read: read_traces"]})
    options = ["--rows", "2000", "--rounds", "1", "--json", str(tmp_path / "trace_store.json")]
    result = CliRunner().invoke(trace_store.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    written, read = json.loads((tmp_path / "trace_store.json").read_text())["rows"]
    assert [written["task"], read["task"]] == ["append: TraceWriter", "read: read_traces"]
    assert read["us_per_row"] is None
    assert read["peak_mb"] > 50 or not Path("/proc/self/status").exists()


def test_coverage_of_intervals():
    rows = {(row["values"], row["seeds"], row["interval"]): row["coverage"] for row in coverage.measure(300)}
    assert rows["normal", 3, "paired t"] == pytest.approx(0.95, abs=0.04)
    assert rows["normal", 10, "Welch's t"] == pytest.approx(0.95, abs=0.04)
    assert rows["normal", 3, "percentile bootstrap"] < 0.85


def test_recorded_coverage_is_in_the_documentation():
    root = Path(__file__).parents[1]
    recorded = json.loads((root / "benchmarks/results/coverage.json").read_text())
    page = (root / "docs/benchmarks.md").read_text()
    kinds = {row["values"]: {} for row in recorded["rows"]}
    for row in recorded["rows"]:
        kinds[row["values"]].setdefault(row["interval"], []).append(f"{row['coverage']:.2f}")
    for kind, intervals in kinds.items():
        cells = [" / ".join(intervals[name]) for name in coverage.METHODS]
        assert f"| {kind} | {' | '.join(cells)} |" in page
