"""Count calls that would launch kernels: ``python -m benchmarks.launches``.

Every call of an ATen function below autograd counts as one launch, a ``_foreach`` call too; views and empty memory do
not count. Nothing is timed, and no accelerator is needed; but the norms of this package are computed in another way on
a CPU. ``--device`` counts on any device that torch has.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import machine, write_json
from benchmarks.workloads import WORKLOADS, Workload
from landscape import GhostNorm, LandscapeProbe, SeqNorm
from landscape.ray.engines.calls import of_type
from landscape.ray.engines.functions import function_traits

SAMPLES = {
    **dict.fromkeys(["simplenet-none", "simplenet-batch", "simplenet-ghost"], 512),
    **dict.fromkeys(["resnet56-batch", "resnet56-ghost"], 16),
    "transformer": 2,
}
"""Samples of a workload's batch: fewer than where it is timed, but so many that products take the same paths."""
STEADY = 11
"""Update that is counted; the engine is selected and the first checks are complete, and the next one is at 100."""
NORMS: dict[str, Callable[[], nn.Module]] = {
    "nn.BatchNorm": lambda: nn.BatchNorm2d(16),
    "GhostNorm": lambda: GhostNorm(16, 8),
    "GhostNorm, interleaved": lambda: GhostNorm(16, 8, layout="interleaved"),
    "SeqNorm": lambda: SeqNorm(16, 8),
}


class Launches(TorchDispatchMode):
    """A mode that counts calls by function.

    Args:
        device: Type of the device; calls without a tensor on it are the host's.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.counts: dict[str, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True, so that the probe's recorder stays above it.

        Then calls that the recorder itself makes are counted.
        """
        return True

    def __exit__(self, *error: Any) -> None:
        """Leave the mode, also below recorders that have started since."""
        above = []
        while (mode := dispatch._pop_mode()) is not self:
            above.append(mode)
        dispatch._push_mode(self)
        super().__exit__(*error)
        for mode in reversed(above):
            dispatch._push_mode(mode)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, before = kwargs or {}, self.total
        if func.namespace == "landscape":  # Its kernel is made of other calls, which the mode must see.
            tensor = next(of_type(Tensor, args))
            with self:
                key: Any = torch._C._parse_dispatch_key(_key(tensor))
                result = func.redispatch(torch._C.DispatchKeySet(key), *args)
        else:
            result = func(*args, **kwargs)
        on_device = any(tensor.device.type == self._device for tensor in of_type(Tensor, (args, kwargs, result)))
        if on_device and self.total == before and _is_launch(func):
            self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return result


def _key(tensor: Tensor) -> str:
    """Return the dispatch key of a tensor's device."""
    kind = tensor.device.type
    return "PrivateUse1" if kind == torch._C._get_privateuse1_backend_name() else kind.upper()


def _is_launch(func: OpOverload) -> bool:
    name, traits = func._schema.name.split("::")[-1], function_traits(func)
    is_host = func.namespace == "profiler" or name.startswith("sym_") or name in ("_unsafe_view", "is_same_size")
    return not (traits.is_view or traits.is_in_place_view or traits.is_blank or is_host)


def count(device: str, run: Callable[[], object]) -> int:
    """Return the number of launches of ``run``."""
    with Launches(torch.device(device).type) as launches:
        run()
    return launches.total


class Training:
    """A workload's model, a batch and an optimizer."""

    def __init__(self, workload: Workload, samples: int | None, device: str) -> None:
        torch.manual_seed(0)
        self.workload, self.model = workload, workload.model().to(device)
        inputs, targets = workload.batch()
        per_sample, samples = len(targets) // len(inputs), samples or len(inputs)
        self.inputs, self.targets = inputs[:samples].to(device), targets[: samples * per_sample].to(device)
        self.criterion = nn.CrossEntropyLoss()
        # On accelerators, foreach is the default. The learning rate is 0, so that every update is the same.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, foreach=True)

    def loss(self) -> Tensor:
        return self.criterion(self.model(self.inputs), self.targets)

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    @torch.no_grad()
    def passes(self) -> None:
        for _ in self.workload.step_sizes:
            self.loss()


def count_update(workload: Workload, samples: int | None, device: str) -> dict[str, int]:
    """Return launches of an update, and those that probes add."""
    training = Training(workload, samples, device)
    losses: list[Tensor] = []
    counts = {
        "forward": count(device, lambda: losses.append(training.loss())),
        "backward": count(device, lambda: losses.pop().backward()),
        "step": count(device, training.optimizer.step),
        "K passes": count(device, training.passes),
    }
    update = count(device, training.update)
    return counts | {
        f"probe, {engine}": count_probed(Training(workload, samples, device), engine, device) - update
        for engine in ("tape", "loop")
    }


def count_probed(training: Training, engine: str, device: str) -> int:
    """Return the launches of one probed update."""
    criterion = training.criterion if engine == "loop" else None
    step_sizes = training.workload.step_sizes
    probe = LandscapeProbe(training.model, training.optimizer, criterion, step_sizes=step_sizes, engine=engine)
    with Launches(torch.device(device).type) as launches, probe:
        for _ in range(STEADY):
            training.update()
        before = launches.total
        training.update()
        after = launches.total
    rows = probe.frame()
    assert len(rows) == STEADY + 1
    assert rows["engine"].iloc[-1] == engine
    return after - before


def count_norm(make: Callable[[], nn.Module], device: str) -> dict[str, int]:
    """Return the launches of a norm layer in training."""
    norm, x = make().to(device), torch.randn(32, 16, 8, 8, device=device)
    gradient = torch.ones_like(x)
    with torch.no_grad():
        forward = count(device, partial(norm, x))
    x.requires_grad_()
    return {"forward": forward, "forward + backward": count(device, lambda: norm(x).backward(gradient))}


@click.command()
@click.option(
    "--workload", "names", multiple=True, type=click.Choice(list(SAMPLES)), help="Repeatable.  [default: all]"
)
@click.option("--device", default="cpu", show_default=True, help="Device of torch, such as cuda.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the tables to this file.")
def main(names: tuple[str, ...], device: str, path: Path | None) -> None:
    """Print the launches of updates, of probes and of norms."""
    updates = {name: count_update(WORKLOADS[name], SAMPLES[name], device) for name in names or SAMPLES}
    norms = {name: count_norm(make, device) for name, make in NORMS.items()}
    click.echo(f"{machine()}\nLaunches on {device}; those of a probe are in addition to the update's.")
    for counts in (updates, norms):
        click.echo(f"\n{pd.DataFrame(counts).T.to_string()}")
    rows = [(name, part, number) for name, counts in (updates | norms).items() for part, number in counts.items()]
    table = pd.DataFrame(rows, columns=["name", "part", "launches"]).assign(device=device)
    write_json(path, table.set_index(["name", "part"]))


if __name__ == "__main__":
    main()
