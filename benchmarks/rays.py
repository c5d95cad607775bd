"""Every way to measure a ray against K bare forward passes: ``python -m benchmarks.rays``.

On random data; each figure is relative to the K forward passes without gradients of the same round. What a way leaves
behind is found by looking. The row of loss-landscapes needs the extra ``bench``.
"""

import json
import re
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

from benchmarks.charts import draw
from benchmarks.methods import WAYS, NotRunError, Setting, Twin, Way
from benchmarks.side_effects import Footprint
from benchmarks.timing import against, interleaved, keep_memory, machine
from benchmarks.workloads import BARE, PROBE, PROBED, UNPROBED, WORKLOADS, Workload
from landscape.plotting.figure import save_figure
from landscape.ray.engines.registry import OPT_IN

REFERENCE = "landscape, loop"
SECONDS, FEWEST, MOST = 40.0, 2, 40


@dataclass(frozen=True)
class Measurement:
    """What one look at a way has shown: its losses and its footprint, or why there are none."""

    losses: Tensor | None = None
    leaves: str = ""
    note: str = ""
    seconds: float | None = None

    def differs(self, expected: Tensor | None) -> float:
        """The largest relative difference from the ``expected`` losses; NaN where there are none."""
        if self.losses is None or expected is None:
            return float("nan")
        return float(((self.losses.cpu().double() - expected.cpu().double()) / expected.cpu().double()).abs().max())


def look(way: Way, setting: Setting) -> Measurement:
    """Run a way once from the start, and compare the state after it with that before it."""
    setting.start.restore(setting.model)
    try:
        started = time.perf_counter()
        losses = way.run(setting)
        seconds = time.perf_counter() - started
    except (RuntimeError, UserWarning) as error:
        return Measurement(note=_reason(error))
    finally:
        after = Footprint.of(setting.model)
        setting.start.restore(setting.model)
    return Measurement(losses, ", ".join(setting.start.changes(after)) or "nothing", way.note, seconds)


def _reason(error: Exception) -> str:
    if isinstance(error, NotRunError):
        return str(error)
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    refused = re.search(r"does not fit this model \((.*)\); its rays", text)
    return textwrap.shorten(f"refused: {refused[1]}" if refused else f"fails: {text}", 100, placeholder=" ...")


def look_at_probe(twin: Twin, setting: Setting) -> Measurement:
    """Compare the state after an update with the probe with that after the same update without it."""
    note = f"engine {twin.settle()}"
    ends, seconds = [], 0.0
    for model, update in [(setting.model, setting.update)] * 2 + [(twin.model, twin.update)]:
        setting.start.restore(model)
        started = time.perf_counter()
        update()
        seconds = time.perf_counter() - started
        ends.append(Footprint.of(model))
    setting.start.restore(setting.model)
    if unsteady := ends[0].changes(ends[1]):
        note += f"; the update alone is not repeatable ({', '.join(unsteady)})"
    losses = torch.tensor(twin.probe.last()["losses"])
    return Measurement(losses, ", ".join(ends[0].changes(ends[2])) or "nothing", note, seconds)


def measure(workload: Workload, rounds: int | None, device: str, opt_in: bool = False) -> pd.DataFrame:
    """The table of one workload, a row for each way; without ``rounds``, as many as fit some forty seconds."""
    setting = Setting(workload, device)
    found: dict[str, Measurement] = {}
    for way in WAYS:
        if not way.replaces or found[way.replaces].seconds is None:
            found[way.name] = look(way, setting)
    engines = {PROBE: "auto"} | ({f"{PROBE}, {name}": name for name in OPT_IN} if opt_in else {})
    twins = {name: Twin(setting, engine) for name, engine in engines.items()}
    found |= {name: look_at_probe(twin, setting) for name, twin in twins.items()}
    rounds = rounds or _rounds(found)
    seconds = _timed(setting, found, twins, rounds)
    if workload.base == BARE:
        seconds = seconds.drop(columns=[UNPROBED, PROBED])
    table = against(seconds, workload.base).reindex(_order(found, list(seconds)))
    looks = {name: found.get(name, Measurement()) for name in table.index}
    return table.assign(
        goal=[workload.goal if name == workload.judged else float("nan") for name in table.index],
        differs=[look.differs(found[REFERENCE].losses) for look in looks.values()],
        leaves=[look.leaves for look in looks.values()],
        note=[look.note for look in looks.values()],
        base=workload.base,
        rounds=rounds,
    )


def _timed(setting: Setting, found: dict[str, Measurement], twins: dict[str, Twin], rounds: int) -> pd.DataFrame:
    """Seconds of all that can be timed; a whole probe is what an update costs more with it than without."""
    candidates: dict[str, Callable[[], object]] = {
        way.name: partial(way.run, setting) for way in WAYS if way.name in found and found[way.name].seconds is not None
    }
    candidates |= {UNPROBED: setting.update} | {name: twin.update for name, twin in twins.items()}
    probes = [len(twin.probe.frame()) for twin in twins.values()]
    seconds = interleaved(candidates, rounds, torch.cuda.synchronize if setting.device.startswith("cuda") else None)
    if any(len(twin.probe.frame()) < before + rounds for twin, before in zip(twins.values(), probes, strict=True)):
        raise RuntimeError("Not every update was probed, so the time of the probe is not known; see the warnings.")
    seconds[PROBED] = seconds[PROBE]
    return seconds.assign(**{name: seconds[name] - seconds[UNPROBED] for name in twins})


def _rounds(found: dict[str, Measurement]) -> int:
    one = sum(look.seconds or 0.0 for look in found.values())
    return max(FEWEST, min(MOST, int(SECONDS / one)))


def _order(found: dict[str, Measurement], timed: list[str]) -> list[str]:
    """Rows as they are read: the bare passes, all that is this package's, all else."""
    names = [*found, *(name for name in timed if name not in found)]
    return sorted(names, key=lambda name: (name != BARE, not name.startswith("landscape"), names.index(name)))


def as_text(table: pd.DataFrame) -> str:
    """The table for people, with its notes below."""
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
    return f"\n{workload.name}: {workload.what}, K={workload.points}; {rounds} rounds; ratios to {workload.base}{goal}"


def versions() -> dict[str, str | None]:
    """What was measured against what, as installed."""
    found: dict[str, str | None] = {}
    for name in ("landscape", "torch", "numpy", "loss-landscapes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write(path: Path | None, table: pd.DataFrame) -> None:
    """Write the machine, the versions and the rows as JSON, if there is a path; what is missing is null."""
    if path is not None:
        rows: list[Any] = json.loads(table.reset_index().to_json(orient="records") or "[]")
        path.write_text(json.dumps({"machine": machine(), "versions": versions(), "rows": rows}, indent=1))


@click.command()
@click.option("--workload", "names", multiple=True, type=click.Choice(list(WORKLOADS)), help="All unless given.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds in which every way takes its turn.  [default: by time]")
@click.option("--threads", default=2, show_default=True, help="CPU threads of torch.")
@click.option("--device", default="cpu", show_default=True, help="Device of torch, such as cuda.")
@click.option("--opt-in", is_flag=True, help=f"Also probe by {', '.join(OPT_IN)}: minutes for each large model.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the tables here.")
@click.option("--chart", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Also draw the ratios here.")
def main(
    names: tuple[str, ...],
    rounds: int | None,
    threads: int,
    device: str,
    opt_in: bool,
    path: Path | None,
    picture: Path | None,
) -> None:
    """Print the time of each way to measure a ray over that of K bare forward passes, and what it leaves behind."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: torch sees no CUDA here.")
    torch.set_num_threads(threads)
    keep_memory()
    click.echo(machine())
    tables = {}
    for workload in (WORKLOADS[name] for name in names or WORKLOADS):
        if workload.cuda and not device.startswith("cuda"):
            click.echo(f"\n{workload.name}: skipped, it needs --device cuda and a GPU.")
            continue
        table = tables[workload.name] = measure(workload, rounds, device, opt_in)
        click.echo(f"{heading(workload, table['rounds'].iloc[0])}\n{as_text(table)}")
        write(path, pd.concat(tables, names=["workload", "way"]))
    if picture is not None and tables:
        save_figure(draw(tables), picture)


if __name__ == "__main__":
    main()
