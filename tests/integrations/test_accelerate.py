"""The probe in loops of Accelerate."""

import itertools

import pytest
import torch
from reference_run import Reference, assert_rows, assert_same_bits
from torch import nn

from landscape import LandscapeError, LandscapeProbe

accelerate = pytest.importorskip("accelerate")

from landscape.integrations.accelerate import attach


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps one state for each process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


ETAS = [0.005, 0.01, 0.04]
CRITERION = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")


def loader(batches=7):
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(6, generator=generator), place % 3) for place in range(12 * batches)]
    return torch.utils.data.DataLoader(data, batch_size=12, generator=torch.Generator())


def make_model():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


class Run:
    """A training, with a probe or with a reference."""

    def __init__(self, probed, accumulate=1, precision="no", clip=False, scaler=None, wrap=lambda m: m, **options):
        torch.manual_seed(0)
        self.accumulate, self.precision, self.clip = accumulate, precision, clip
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        if scaler is not None:
            self.accelerator.scaler = scaler  # Accelerate makes one on GPUs only
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(wrap(model), optimizer, loader())
        self.reference = None if probed else Reference(ETAS, self.optimizer.optimizer)
        self.probe = None
        if probed:
            options = {"step_sizes": ETAS} | options
            self.probe = attach(self.accelerator, self.model, self.optimizer, **options)

    def train(self, start=0, end=None):
        for x, y in itertools.islice(self.loader, start, end):
            with self.accelerator.accumulate(self.model):
                if self.reference:
                    self.reference.forward(self.model, self.loss_of(x, y))
                self.accelerator.backward(CRITERION(self.model(x), y))
                if self.accelerator.sync_gradients:
                    if (
                        self.clip and self.accelerator.scaler is not None
                    ):  # with fp16, which GPUs have, clipping does it
                        self.accelerator.scaler.unscale_(self.optimizer.optimizer)
                    if self.clip:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                    if self.reference:
                        self.unscaled(self.reference.step)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    def loss_of(self, x, y):
        """Return what the loop differentiates. Accelerate divides a short window by the full one, too."""

        def loss(model):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                outputs = model(x)
            return CRITERION(outputs.float(), y) / self.accumulate

        return loss

    def unscaled(self, call):
        """Call with the gradients that the optimizer gets from the scaler."""
        scale = 1.0 if self.accelerator.scaler is None or self.clip else self.accelerator.scaler.get_scale()
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        before = [gradient.clone() for gradient in gradients]
        for gradient in gradients:
            gradient /= scale
        call()
        for gradient, old in zip(gradients, before, strict=True):
            gradient.copy_(old)

    def state(self):
        momenta = {f"momentum{n}": s["momentum_buffer"] for n, s in enumerate(self.optimizer.state.values())}
        return self.model.state_dict() | momenta | {"rng": torch.get_rng_state()}


def compare(skipped=0, make_scaler=lambda: None, **options):
    bare = Run(False, scaler=make_scaler(), **options).train()
    probed = Run(True, scaler=make_scaler(), **options).train()
    probed.probe.detach()
    assert_same_bits(probed.state(), bare.state())
    assert_rows(probed.probe.frame(), bare.reference.rows[skipped:], rel=1e-5)
    return probed.probe.frame()


def test_sinks_get_the_rows():
    seen = []
    probe = Run(True, accumulate=2, sinks=[seen.append]).train().probe
    probe.detach()
    assert [row["loss"] for row in seen] == probe.frame()["loss"].tolist() != []


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_rows_are_those_of_a_plain_loop(accumulate, clip, precision):
    frame = compare(accumulate=accumulate, clip=clip, precision=precision)
    assert len(frame) == -(-7 // accumulate)  # the short last window, too


@pytest.mark.parametrize("clip", [False, True])
def test_loss_scaling_with_a_skipped_step(clip):
    def make_scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)

    compare(skipped=1, make_scaler=make_scaler, clip=clip)


def test_resumed_run(tmp_path):
    whole = Run(True, trace=tmp_path / "whole").train()
    whole.probe.detach()
    first = Run(True, trace=tmp_path / "parts").train(end=4)
    first.accelerator.save_state(tmp_path / "checkpoint")
    first.train(start=4, end=6)  # lost
    first.probe.detach()
    second = Run(True, trace=tmp_path / "parts", resume=True)
    second.accelerator.load_state(tmp_path / "checkpoint")
    second.train(start=4)
    second.probe.detach()
    assert_same_bits(second.state(), whole.state())
    one, other = second.probe.frame(), whole.probe.frame()
    assert list(one["step"]) == list(other["step"]) == list(range(7))
    assert [*map(list, one["losses"])] == [*map(list, other["losses"])]


def test_two_probes_of_one_accelerator_resume_their_own_traces(tmp_path):
    """An actor and a critic."""

    def run(resume):
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True)
        probes, loops = [], []
        for name, every in (("actor", 1), ("critic", 2)):
            model = make_model()
            model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
            options = {"step_sizes": ETAS, "every": every, "trace": tmp_path / name, "resume": resume}
            probes.append(attach(accelerator, model, optimizer, **options))
            loops.append((model, optimizer))
        if resume:
            accelerator.load_state(tmp_path / "checkpoint")
        for place, (model, optimizer) in enumerate(loops):
            for x, y in itertools.islice(loader(), 4 - 2 * place):
                optimizer.zero_grad()
                accelerator.backward(CRITERION(model(x), y))
                optimizer.step()
        if not resume:
            accelerator.save_state(tmp_path / "checkpoint")
        for probe in probes:
            probe.detach()
        return [list(probe.frame()["step"]) for probe in probes]

    assert run(False) == [[0, 1, 2, 3], [0]]
    assert run(True) == [[*range(8)], [0, 2]]


def test_checkpoint_without_a_probe_can_be_loaded(tmp_path):
    Run(False).accelerator.save_state(tmp_path)
    run = Run(True, trace=tmp_path / "trace")
    run.accelerator.load_state(tmp_path)
    run.train().probe.detach()
    assert len(run.probe.frame()) == 7


def test_optimizers_that_step_together():
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    pair = [torch.optim.SGD(list(model.parameters())[place::2], lr=0.1) for place in (0, 1)]
    model, *pair = accelerator.prepare(model, *pair)
    with attach(accelerator, model, pair, step_sizes=ETAS) as probe:
        for x, y in loader():
            accelerator.backward(CRITERION(model(x), y))
            for optimizer in pair:
                optimizer.step()
                optimizer.zero_grad()
    assert len(probe.frame()) == 7


def test_compiled_model_is_refused_or_measured_with_a_criterion():
    torch.compiler.reset()  # After many compilations in one process torch would run the model uncompiled.

    def wrap(model):
        return torch.compile(model, backend="aot_eager")

    run = Run(True, wrap=wrap)
    with pytest.raises(LandscapeError, match=r"torch\.compile"):
        run.train()
    run.probe.detach()
    bare = Run(False).train()
    probed = Run(True, wrap=wrap, criterion=CRITERION).train()
    probed.probe.detach()
    assert_rows(probed.probe.frame(), bare.reference.rows, rel=1e-5)


def test_what_cannot_be_measured_is_refused():
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(LandscapeError, match="DataParallel"):
        attach(accelerator, nn.DataParallel(model), optimizer)
    with pytest.raises(LandscapeError, match="LandscapeProbe"):
        attach(LandscapeProbe(model, optimizer), model, optimizer)
    model.hf_split_points = "auto"
    with pytest.raises(LandscapeError, match="pipeline"):
        attach(accelerator, model, optimizer)
    del model.hf_split_points
    for name in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        accelerator.state.distributed_type = accelerate.DistributedType[name]
        try:
            with pytest.raises(LandscapeError, match=name):
                attach(accelerator, model, optimizer)
        finally:
            accelerator.state.distributed_type = accelerate.DistributedType.NO
