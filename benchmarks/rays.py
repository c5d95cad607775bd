"""Time methods to compute the losses along a ray against K bare forward passes: ``python -m benchmarks.rays``.

Data are random, and ratios are to the K forward passes without gradients of the same round. Side effects are found by
comparing all state before and after. The row of loss-landscapes needs the extra ``bench``.
"""

import json
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor

from benchmarks.charts import draw_rays
from benchmarks.methods import METHODS, Method, NotRunError, ProbedCopy, Workbench
from benchmarks.side_effects import SideEffects
from benchmarks.timing import compare, interleaved, keep_memory, machine
from benchmarks.workloads import BARE, PROBE, PROBED, UNPROBED, WORKLOADS, Workload
from landscape.plotting.figure import save_figure

REFERENCE = "landscape, loop"
SECONDS, FEWEST, MOST = 40.0, 2, 40
"""Time of the default rounds of a workload, and the limits of their number."""


@dataclass(frozen=True)
class Measurement:
    """Result of running a method once.

    Attributes:
        losses: Losses along the ray (K,), or None if there are none.
        leaves: Side effects, as text.
        note: Remark, or the reason why the method did not run.
        seconds: Time of this run; None if the method did not run.
    """

    losses: Tensor | None = None
    leaves: str = ""
    note: str = ""
    seconds: float | None = None

    def differs(self, expected: Tensor | None) -> float:
        """Return the largest relative difference of losses; NaN without losses."""
        if self.losses is None or expected is None:
            return float("nan")
        return float(((self.losses.cpu().double() - expected.cpu().double()) / expected.cpu().double()).abs().max())


def run_once(method: Method, workbench: Workbench) -> Measurement:
    """Run a method once; compare the state before and after."""
    workbench.start.restore(workbench.model)
    try:
        start = time.perf_counter()
        losses = method.run(workbench)
        seconds = time.perf_counter() - start
    except (RuntimeError, UserWarning) as error:
        return Measurement(note=_reason(error))
    finally:
        after = SideEffects.snapshot(workbench.model)
        workbench.start.restore(workbench.model)
    return Measurement(losses, ", ".join(workbench.start.changes(after)) or "nothing", method.note, seconds)


def _reason(error: Exception) -> str:
    if isinstance(error, NotRunError):
        return str(error)
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return textwrap.shorten(f"fails: {text}", 100, placeholder=" ...")


def run_probe_once(probed: ProbedCopy, workbench: Workbench) -> Measurement:
    """Run an update with the probe and without; compare states."""
    note = f"engine {probed.warm_up()}"
    ends, seconds = [], 0.0
    # The update without the probe runs twice, which shows if it is deterministic at all.
    for model, update in [(workbench.model, workbench.update)] * 2 + [(probed.model, probed.update)]:
        workbench.start.restore(model)
        start = time.perf_counter()
        update()
        seconds = time.perf_counter() - start
        ends.append(SideEffects.snapshot(model))
    workbench.start.restore(workbench.model)
    if changes := ends[0].changes(ends[1]):
        note += f"; the update alone is not repeatable ({', '.join(changes)})"
    losses = torch.tensor(probed.probe.last()["losses"])
    return Measurement(losses, ", ".join(ends[0].changes(ends[2])) or "nothing", note, seconds)


def measure(workload: Workload, rounds: int | None, device: str) -> pd.DataFrame:
    """Measure a workload; return a row for each method.

    Without ``rounds``, their number is chosen to take about 40 s.
    """
    workbench = Workbench(workload, device)
    found: dict[str, Measurement] = {}
    for method in METHODS:
        if not method.replaces or found[method.replaces].seconds is None:
            found[method.name] = run_once(method, workbench)
    copies = {PROBE: ProbedCopy(workbench), f"{PROBE} with criterion": ProbedCopy(workbench, given=True)}
    found |= {name: run_probe_once(probed, workbench) for name, probed in copies.items()}
    rounds = rounds or _default_rounds(found)
    seconds = _time(workbench, found, copies, rounds)
    if workload.base == BARE:
        seconds = seconds.drop(columns=[UNPROBED, PROBED])
    table = compare(seconds, workload.base).reindex(_row_order(found, list(seconds)))
    measurements = [found.get(name, Measurement()) for name in table.index]
    return table.assign(
        goal=[workload.goal if name == workload.judged else float("nan") for name in table.index],
        differs=[measurement.differs(found[REFERENCE].losses) for measurement in measurements],
        leaves=[measurement.leaves for measurement in measurements],
        note=[measurement.note for measurement in measurements],
        base=workload.base,
        rounds=rounds,
    )


def _time(
    workbench: Workbench, found: dict[str, Measurement], copies: dict[str, ProbedCopy], rounds: int
) -> pd.DataFrame:
    """Return seconds (rounds, methods) of everything that can be timed.

    The time of a whole probe is that of an update with it minus that of an update without it.
    """
    candidates: dict[str, Callable[[], object]] = {
        method.name: partial(method.run, workbench)
        for method in METHODS
        if method.name in found and found[method.name].seconds is not None
    }
    candidates |= {UNPROBED: workbench.update} | {name: probed.update for name, probed in copies.items()}
    probes = [len(probed.probe.frame()) for probed in copies.values()]
    seconds = interleaved(candidates, rounds, torch.cuda.synchronize if workbench.device.startswith("cuda") else None)
    if any(len(probed.probe.frame()) < before + rounds for probed, before in zip(copies.values(), probes, strict=True)):
        raise RuntimeError("Some updates were not probed, so the time of the probe is unknown. See the warnings.")
    seconds[PROBED] = seconds[PROBE]
    return seconds.assign(**{name: seconds[name] - seconds[UNPROBED] for name in copies})


def _default_rounds(found: dict[str, Measurement]) -> int:
    seconds_per_round = sum(measurement.seconds or 0.0 for measurement in found.values())
    return max(FEWEST, min(MOST, int(SECONDS / seconds_per_round)))


def _row_order(found: dict[str, Measurement], timed: list[str]) -> list[str]:
    """Return the rows: bare passes, this package, alternatives."""
    names = [*found, *(name for name in timed if name not in found)]
    return sorted(names, key=lambda name: (name != BARE, not name.startswith("landscape"), names.index(name)))


def as_text(table: pd.DataFrame) -> str:
    """Format the table, with its notes below."""
    text = pd.DataFrame(
        {
            "ms": table["ms"].map("{:.1f}".format, na_action="ignore"),
            "ratio": table["ratio"].map("{:.2f}".format, na_action="ignore"),
            "quartiles": (table["from"].map("{:.2f}".format) + " - " + table["to"].map("{:.2f}".format)),
            "goal": table["goal"].map("{:g}".format, na_action="ignore"),
            "differs": table["differs"].map("{:.0e}".format, na_action="ignore"),
            "leaves behind": table["leaves"],
        }
    )
    text["quartiles"] = text["quartiles"].mask(table["ms"].isna(), "")
    notes = [f"  {name}: {note}" for name, note in zip(table.index, table["note"].tolist(), strict=True) if note]
    return "\n".join([text.fillna("").rename_axis(None).to_string(), *notes])


def heading(workload: Workload, rounds: int) -> str:
    goal = "" if workload.goal is None else f"; goal: {workload.judged} at most {workload.goal:g}"
    title = f"{workload.name}: {workload.description}, K={workload.points}"
    return f"\n{title}; {rounds} rounds; ratios to {workload.base}{goal}"


def versions() -> dict[str, str | None]:
    """Return the installed versions of what is compared."""
    found: dict[str, str | None] = {}
    for name in ("landscape", "torch", "numpy", "loss-landscapes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write(path: Path | None, table: pd.DataFrame) -> None:
    """Write machine, versions and rows to a JSON file.

    Without a path nothing is written. Missing values become null.
    """
    if path is not None:
        rows: list[Any] = json.loads(table.reset_index().to_json(orient="records") or "[]")
        path.write_text(json.dumps({"machine": machine(), "versions": versions(), "rows": rows}, indent=1))


@click.command()
@click.option(
    "--workload", "names", multiple=True, type=click.Choice(list(WORKLOADS)), help="Repeatable.  [default: all]"
)
@click.option("--rounds", type=click.IntRange(1), help="Timings of each method.  [default: as many as fit 40 s]")
@click.option("--threads", default=2, show_default=True, help="CPU threads of torch.")
@click.option("--device", default="cpu", show_default=True, help="Device of torch, such as cuda.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the tables to this file.")
@click.option(
    "--chart", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the ratios to this file."
)
def main(
    names: tuple[str, ...],
    rounds: int | None,
    threads: int,
    device: str,
    path: Path | None,
    picture: Path | None,
) -> None:
    """Print times relative to K forward passes, and side effects."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: torch finds no CUDA device. Use --device cpu.")
    torch.set_num_threads(threads)
    keep_memory()
    click.echo(machine())
    tables = {}
    for workload in (WORKLOADS[name] for name in names or WORKLOADS):
        if workload.cuda and not device.startswith("cuda"):
            click.echo(f"\n{workload.name}: skipped, since it needs --device cuda.")
            continue
        table = tables[workload.name] = measure(workload, rounds, device)
        click.echo(f"{heading(workload, table['rounds'].iloc[0])}\n{as_text(table)}")
        write(path, pd.concat(tables, names=["workload", "way"]))  # The JSON files have the key "way".
    if picture is not None and tables:
        save_figure(draw_rays(tables), picture)


if __name__ == "__main__":
    main()
