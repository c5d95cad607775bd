"""Time the parts of a probed update: ``python -m benchmarks.components``.

The parts are: record the training step's calls, plan which of them a ray needs, build the replay (with the slopes of
products), and replay them at the K step sizes. CPU time of one thread, as ratios to K bare forward passes.

The column "probe" is a whole probe, measured as an update with it less one without, in the same unit. The column
"gradients" is an update with ``gradients=True``, in updates without a probe.
"""

import time

import click
import pandas as pd
import torch

from benchmarks.methods import ProbedCopy, Workbench, bare
from benchmarks.timing import keep_memory, machine
from benchmarks.workloads import WORKLOADS, Workload
from landscape.ray.engines.recorder import Recorder
from landscape.ray.engines.replay import Plan, Replay
from landscape.ray.loss_module import LossModule

PARTS = ["record", "plan", "build", "replay"]


class Stopwatch:
    """CPU seconds of parts, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.process_time()

    def end(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part], self._started = now - self._started, now


def measure_once(workbench: Workbench) -> dict[str, float]:
    """Return CPU seconds of each part, and a replay's calls."""
    model, watch = workbench.model, Stopwatch()
    bare(workbench)
    watch.end("bare")
    workbench.loss(model)
    watch.end("step")
    recorder = Recorder(dict(model.named_parameters()))
    with recorder.recording():
        loss = workbench.loss(model)
    root = recorder.add_root([loss], [None])
    tape = recorder.tape([root], LossModule(model), loss.detach())
    watch.end("record")
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad(), tape.rng_restored():
        calls = len(Plan.of(tape).calls)
        watch.end("plan")
        replay = Replay(tape, origin, workbench.gradient)
        watch.end("build")
        replay.losses(workbench.step_sizes)
        watch.end("replay")
    seconds = watch.seconds
    seconds["record"] -= seconds.pop("step")  # The step itself is the training's.
    seconds["build"] -= seconds["plan"]
    return seconds | {"calls": calls}


def measure_updates(workbench: Workbench, probed: ProbedCopy, differentiated: ProbedCopy) -> dict[str, float]:
    """Return CPU seconds of updates, without and with probes."""
    watch = Stopwatch()
    for part, update in (("update", workbench.update), ("probed", probed.update), ("both", differentiated.update)):
        update()
        watch.end(part)
    return watch.seconds


def measure(workload: Workload, rounds: int) -> dict[str, float]:
    """Return median ratios of the parts to K bare passes."""
    workbench = Workbench(workload, "cpu")
    copies = ProbedCopy(workbench), ProbedCopy(workbench, gradients=True)
    for probed in copies:
        probed.warm_up()
    rows = [measure_once(workbench) | measure_updates(workbench, *copies) for _ in range(rounds + 1)]
    rows = pd.DataFrame(rows).iloc[1:]
    ratios = rows[PARTS].div(rows["bare"], axis=0).median()
    probe = ((rows["probed"] - rows["update"]) / rows["bare"]).median()
    gradients = (rows["both"] / rows["update"]).median()
    return {"calls": rows["calls"].iloc[0], **ratios, "probe": probe, "gradients": gradients}


@click.command()
@click.option("--workload", "names", multiple=True, type=click.Choice(list(WORKLOADS)), help="Repeatable.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(names: tuple[str, ...], rounds: int) -> None:
    """Print each part relative to K bare forward passes."""
    torch.set_num_threads(1)
    keep_memory()
    click.echo(machine())
    chosen = names or [name for name, workload in WORKLOADS.items() if not workload.cuda]
    table = pd.DataFrame({name: measure(WORKLOADS[name], rounds) for name in chosen}).T
    click.echo(table.astype({"calls": int}).round(3).to_string())


if __name__ == "__main__":
    main()
