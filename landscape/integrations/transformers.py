"""Probe for the Trainer of Transformers, and its subclasses such as TRL's SFTTrainer."""

import base64
import io
from typing import Any

import torch
from torch import nn

from landscape.errors import LandscapeError
from landscape.integrations.support import check_accelerator, check_options, check_whole, import_host
from landscape.probe import LandscapeProbe

transformers = import_host("transformers", "transformers")
_callbacks = import_host("transformers.trainer_callback", "transformers")


class AttachedProbe:
    """The probe of a Trainer, made anew by each ``trainer.train()``.

    Attributes:
        probe: The `LandscapeProbe` of the last training; None before the first.
    """

    def __init__(self, trainer: Any, options: dict[str, Any]) -> None:
        self.probe: LandscapeProbe | None = None
        self._trainer, self._options = trainer, options

    def begin(self, state: str | None) -> None:
        """Attach a probe, once the Trainer has prepared its model.

        Args:
            state: The encoded state of the checkpoint that the Trainer resumes from.
        """
        self.end()  # with auto_find_batch_size the Trainer begins again
        model, optimizer, options = self._trainer.model_wrapped, self._trainer.optimizer, self._options
        check_whole(model)
        self.probe = LandscapeProbe(model, optimizer, **options)
        if state is not None and options.get("trace") is not None:  # rows in memory were lost with their process
            self.probe.load_state_dict(_decoded(state))
        self.probe.attach()
        if self._trainer.args.torch_compile:
            self._trainer.compute_loss = self._observed(self.probe)

    def end(self) -> None:
        """Detach the probe, if there is one."""
        if self._trainer.args.torch_compile:
            vars(self._trainer).pop("compute_loss", None)
        if self.probe is not None:
            self.probe.detach()

    def _observed(self, probe: LandscapeProbe) -> Any:
        """Return ``compute_loss`` for compiled models, whose calls cannot be repeated."""
        compute_loss = self._trainer.compute_loss

        def loss_of(model: nn.Module, inputs: dict[str, Any], items: Any) -> torch.Tensor:
            return compute_loss(model, dict(inputs), num_items_in_batch=items)  # It may pop the labels.

        def observed(
            model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if return_outputs or not model.training:  # an evaluation
                return compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return probe.observe(loss_of, inputs, num_items_in_batch)

        return observed

    def state(self) -> str | None:
        """Return the encoded state, or None without a trace."""
        if self.probe is None or self._options.get("trace") is None:
            return None
        return _encoded(self.probe.state_dict())


def attach(trainer: Any, /, **options: Any) -> AttachedProbe:
    """Attach a probe to a Trainer of Transformers.

    Each ``trainer.train()`` is probed from its first update to its end. With a ``trace``, the state of the probe is in
    the Trainer's checkpoints, in ``trainer_state.json``: with ``resume=True``,
    ``trainer.train(resume_from_checkpoint=...)`` continues the trace. The Trainer's ``compute_loss``, callbacks
    and logs are called as often as without a probe.

    Args:
        trainer: The ``transformers.Trainer``, before ``train()``.
        options: Options of `LandscapeProbe`.

    Returns:
        An object whose attribute ``probe`` is the `LandscapeProbe` of the training.

    Raises:
        LandscapeError: The updates cannot be measured (DeepSpeed, ``DataParallel``, ``torch_compile=True``
            with a ``compute_loss`` of your own), or an option
            is out of range.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
        >>> from landscape.integrations.transformers import attach
        >>> size = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
        >>> data = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 16
        >>> arguments = TrainingArguments(
        ...     "out", num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        ... )
        >>> trainer = Trainer(model, arguments, train_dataset=data)
        >>> trainer.remove_callback(PrinterCallback)
        >>> attached = attach(trainer)
        >>> _ = trainer.train()
        >>> len(attached.probe.frame())
        2
    """
    if not isinstance(trainer, transformers.Trainer):
        raise LandscapeError(f"trainer={type(trainer).__name__}: must be a transformers.Trainer.")
    _check_trainer(trainer)
    check_options(options)
    attached = AttachedProbe(trainer, options)
    callback = _callback_of(attached)
    if any(type(other).__name__ == type(callback).__name__ for other in trainer.callback_handler.callbacks):
        raise LandscapeError("trainer: has a probe already. Attach one.")
    trainer.add_callback(callback)
    train = trainer.train

    def train_and_end(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            attached.end()

    trainer.train = train_and_end  # the only place that also sees a training that fails
    return attached


def _check_trainer(trainer: Any) -> None:
    check_accelerator(trainer.accelerator)
    check_whole(trainer.model_wrapped)
    if trainer.args.n_gpu > 1:
        raise LandscapeError(
            f"trainer: would train by DataParallel on {trainer.args.n_gpu} GPUs, which cannot be measured. Use one GPU "
            "(CUDA_VISIBLE_DEVICES=0), or start the script by torchrun."
        )
    overrides = type(trainer).compute_loss is not transformers.Trainer.compute_loss or trainer.compute_loss_func
    if trainer.args.torch_compile and overrides:
        raise LandscapeError(
            "torch_compile=True: needs the compute_loss of transformers.Trainer, to call it again at each step size. "
            "Train without torch_compile: then any loss is measured, and your code is called once."
        )


def _callback_of(attached: AttachedProbe) -> Any:
    """Return a callback that starts and saves the probe."""

    # A class of its own: with restore_callback_states_from_checkpoint the Trainer makes another object of it.
    class LandscapeCallback(_callbacks.TrainerCallback, _callbacks.ExportableState):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved = state.stateful_callbacks.get("LandscapeCallback", {}) if state.global_step else {}
            attached.begin(saved.get("attributes", {}).get("saved"))

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"saved": attached.state()}}

    return LandscapeCallback()


def _encoded(state: dict[str, Any]) -> str:
    """Return a state as text, as the Trainer's is JSON."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _decoded(text: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
