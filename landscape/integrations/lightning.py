"""Probe for the Trainer of Lightning."""

from pathlib import Path
from typing import Any

from landscape.errors import LandscapeError
from landscape.integrations.support import check_options, check_whole, import_host
from landscape.probe import LandscapeProbe
from landscape.probe.sinks import Sink

lightning = import_host("lightning.pytorch", "lightning")


class LandscapeCallback(lightning.Callback):
    """Probes each ``trainer.fit``, from its first update to its end.

    Each optimizer has a probe of its own, as those of a GAN do, unless they step ``together``. The module's
    ``training_step``, its logs and metrics, and other callbacks are called as often as without a probe. With a
    ``trace``, the state of the probes is in Lightning's checkpoints: with ``resume=True``,
    ``trainer.fit(..., ckpt_path=...)`` continues the trace.

    Args:
        together: True if several optimizers make each update together: one probe, one ray along the gradients of all.
        options: Options of `LandscapeProbe`. With several probes, ``trace`` is a folder of traces, ``optimizer0``, ...

    Attributes:
        probes: The probes of the last ``fit``, in the order of ``trainer.optimizers``.

    Raises:
        LandscapeError: When training begins: the updates cannot be measured (DeepSpeed, XLA, ``DataParallel``), or an
            option is out of range.

    Examples:
        >>> import lightning, torch
        >>> from landscape.integrations.lightning import LandscapeCallback
        >>> class Module(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 1)
        ...     def training_step(self, batch, index):
        ...         return self.layer(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> callback = LandscapeCallback()
        >>> quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        >>> options = dict.fromkeys(quiet, False)
        >>> trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=callback, **options)
        >>> trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8))
        >>> len(callback.probe.frame())
        4
    """

    def __init__(self, *, together: bool = False, **options: Any) -> None:
        check_options(options)
        self.probes: list[LandscapeProbe] = []
        self._together, self._options = together, options
        self._states: list[dict[str, Any]] = []

    @property
    def probe(self) -> LandscapeProbe:
        """The probe, if there is one only."""
        if len(self.probes) != 1:
            raise LandscapeError(
                f"probe: there are {len(self.probes)} probes. Use probes[0], ..., after fit has begun."
            )
        return self.probes[0]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be measured."""
        if stage == "fit":
            _check_strategy(trainer.strategy)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the probes."""
        self._detach()
        model = trainer.strategy.model  # with DistributedDataParallel around the module, if there is one
        check_whole(model)
        optimizers = [list(trainer.optimizers)] if self._together else trainer.optimizers
        if not optimizers:
            raise LandscapeError("configure_optimizers: returned no optimizer, so that there is no update to probe.")
        places = [None] if len(optimizers) == 1 else range(len(optimizers))
        self.probes = [
            LandscapeProbe(model, optimizer, **self._options_of(place))
            for place, optimizer in zip(places, optimizers, strict=True)
        ]
        for probe, state in zip(self.probes, self._states, strict=False):
            probe.load_state_dict(state)
        self._states = []
        for probe in self.probes:
            probe.attach()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach the probes."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach the probes."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the probes, for a checkpoint."""
        if self._options.get("trace") is None:
            return {}
        return {"probes": [probe.state_dict() for probe in self.probes]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training begins."""
        self._states = state_dict["probes"] if self._options.get("trace") is not None else []

    def _detach(self) -> None:
        for probe in self.probes:
            probe.detach()

    def _options_of(self, place: int | None) -> dict[str, Any]:
        """Return the options of one of several probes."""
        options = dict(self._options)
        if place is not None:
            options["facts"] = {"optimizer_index": place} | (options.get("facts") or {})
            if (trace := options.get("trace")) is not None:
                name = f"optimizer{place}"
                options["trace"] = trace / name if isinstance(trace, Path) else f"{str(trace).rstrip('/')}/{name}"
            options["sinks"] = [_Renamed(sink, f"optimizer{place}/") for sink in options.get("sinks", ())]
        return options


class _Renamed:
    """A sink for one of several probes."""

    def __init__(self, sink: Sink, prefix: str) -> None:
        self.__name__ = getattr(sink, "__name__", type(sink).__name__)
        self.flush = getattr(sink, "flush", lambda: None)
        self._sink, self._prefix = sink, prefix

    def __call__(self, row: dict[str, Any]) -> None:
        """Hand a row over by names of its own."""
        self._sink({name if name == "step" else f"{self._prefix}{name}": value for name, value in row.items()})


def _check_strategy(strategy: Any) -> None:
    name = type(strategy).__name__
    if strategy.handles_gradient_accumulation or "XLA" in name:
        raise LandscapeError(
            f"strategy={name}: keeps gradients and steps of its own, so that no update can be measured. Use "
            "another one, such as 'ddp'."
        )
