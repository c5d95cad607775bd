"""The probe in the Trainer of Lightning."""

import pytest
import torch
from reference_run import Reference, assert_rows, assert_same_bits
from torch import nn

from landscape import LandscapeError, read_traces

lightning = pytest.importorskip("lightning.pytorch")

import torchmetrics

from landscape.integrations.lightning import LandscapeCallback

ETAS = [0.05, 0.1, 0.4]


def loader(batches=7):
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(6, generator=generator), place % 3) for place in range(12 * batches)]
    return torch.utils.data.DataLoader(data, batch_size=12)


def mlp(outputs=3):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, outputs))


class Module(lightning.LightningModule):
    """Logs, counts, and calls a part of itself, so that its own ``forward`` is never called."""

    def __init__(self):
        super().__init__()
        self.net, self.criterion = mlp(), nn.CrossEntropyLoss(label_smoothing=0.1)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.counts, self.logged, self.reference, self.scale = {}, [], None, 1.0

    def count(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1

    def log(self, name, value, **options):
        self.count("log")
        super().log(name, value, **options)

    def training_step(self, batch, index):
        self.count("training_step")
        x, y = batch
        if self.reference:
            windows = self.trainer.accumulate_grad_batches
            if index % windows == 0:
                self.reference.drop()
            enabled = self.trainer.precision == "bf16-mixed"

            def loss(net):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    return self.criterion(net(x), y) / windows

            self.reference.forward(self.net, loss)
        outputs = self.net(x)
        self.accuracy(outputs, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        loss = self.criterion(outputs, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        self.count("validation_step")
        self.log("validation", self.criterion(self.net(batch[0]), batch[1]))

    def optimizer_step(self, *args, **kwargs):
        self.count("optimizer_step")
        super().optimizer_step(*args, **kwargs)

    def on_train_epoch_end(self):
        self.logged.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


class StepReference(lightning.Callback):
    """A hook of the raw optimizer, which sees the gradient as it is used."""

    def on_train_start(self, trainer, module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self.before)
        self.module = module

    def before(self, optimizer, args, kwargs):
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.module.reference.step(optimizer)
            return None

        def followed():
            result = closure()
            self.module.reference.step(optimizer)
            return result

        return (args[0], followed), {}


class Counting(lightning.Callback):
    """Counts the calls of hooks."""

    def __init__(self):
        self.counts = {}

    def __getattribute__(self, name):
        if name.startswith("on_") and name != "on_exception":
            counts = object.__getattribute__(self, "counts")
            counts[name] = counts.get(name, 0) + 1
        return object.__getattribute__(self, name)


def make_trainer(tmp_path, callbacks=(), **options):
    options = {"max_epochs": 2, "enable_checkpointing": False, "logger": False} | options
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[*callbacks],
        **options,
    )


def fit(tmp_path, callbacks, make=Module, prepare=lambda module: None, ckpt_path=None, **options):
    lightning.seed_everything(0)
    module, counting = make(), Counting()
    prepare(module)
    made = {name: value() if callable(value) else value for name, value in options.items()}
    trainer = make_trainer(tmp_path, [*callbacks, counting], **made)
    trainer.fit(module, loader(), loader(2), ckpt_path=ckpt_path)
    state = module.state_dict() | {"rng": torch.get_rng_state()}
    for place, optimizer in enumerate(trainer.optimizers):
        for number, one in enumerate(optimizer.state.values()):
            state |= {f"{place}.{number}.{name}": torch.as_tensor(value) for name, value in one.items()}
    return module, state, counting.counts


def compare(tmp_path, rel=2e-5, make=Module, **options):
    def prepare(module):
        module.reference = Reference(ETAS)

    bare, expected, hooks = fit(tmp_path / "bare", [StepReference()], make, prepare, **options)
    callback = LandscapeCallback(step_sizes=ETAS)
    probed, state, other_hooks = fit(tmp_path / "probed", [callback], make, **options)
    assert_same_bits(state, expected)
    assert probed.counts == bare.counts
    assert probed.logged == bare.logged
    assert other_hooks == hooks
    assert_rows(callback.probe.frame(), bare.reference.rows, rel=rel)
    return callback.probe.frame()


CASES = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
    "evaluation and checkpoints": {"val_check_interval": 2, "enable_checkpointing": True},
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_a_plain_loop(name, tmp_path):
    options = CASES[name]
    frame = compare(tmp_path, rel=1e-3 if "precision" in options else 2e-5, **options)
    assert len(frame) == 2 * -(-7 // options.get("accumulate_grad_batches", 1))  # the short last window, too


def test_clipping_by_value_is_followed_and_said(tmp_path):
    with pytest.warns(UserWarning, match="clipped by value"):
        compare(tmp_path, gradient_clip_val=0.01, gradient_clip_algorithm="value", accumulate_grad_batches=2)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_loss_scaling_with_a_skipped_step(clip, tmp_path):
    def plugin():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
        plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        return plugin

    class Summed(Module):
        def __init__(self):
            super().__init__()
            self.criterion = nn.CrossEntropyLoss(reduction="sum")

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.01)

    frame = compare(tmp_path, make=Summed, plugins=plugin, gradient_clip_val=clip)
    assert len(frame) == 13


class Gan(lightning.LightningModule):
    """Two networks with an optimizer each, trained by turns."""

    def __init__(self, toggled=True):
        super().__init__()
        self.automatic_optimization, self.toggled = False, toggled
        self.generator, self.critic, self.references = mlp(6), mlp(1), None
        self.calls = 0

    def training_step(self, batch, index):
        self.calls += 1
        x = batch[0]
        losses = [
            lambda generator: -self.critic(generator(x)).mean(),
            lambda critic: critic(self.generator(x)).mean() - critic(x).mean() + critic(x).square().mean(),
        ]
        for place, (optimizer, loss) in enumerate(zip(self.optimizers(), losses, strict=True)):
            part = (self.generator, self.critic)[place]
            if self.toggled:
                self.toggle_optimizer(optimizer)
            if self.references:
                whole = nn.ModuleList([self.generator, self.critic])
                self.references[place].forward(whole, lambda moved, place=place: self.loss(moved, place, x))
            optimizer.zero_grad()
            value = loss(part)
            self.manual_backward(value)
            if self.references:
                self.references[place].step(optimizer.optimizer)
            self.log(f"loss{place}", value)
            optimizer.step()
            if self.toggled:
                self.untoggle_optimizer(optimizer)

    @staticmethod
    def loss(moved, place, x):
        generator, critic = moved
        if place == 0:
            return -critic(generator(x)).mean()
        return critic(generator(x)).mean() - critic(x).mean() + critic(x).square().mean()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.critic)]


@pytest.mark.parametrize("toggled", [True, False])
def test_each_optimizer_of_manual_optimization_has_a_probe(toggled, tmp_path):
    def prepare(module):
        module.references = [Reference(ETAS), Reference(ETAS)]

    bare, expected, _ = fit(tmp_path / "bare", [], lambda: Gan(toggled), prepare)
    seen = []
    callback = LandscapeCallback(step_sizes=ETAS, trace=tmp_path / "traces", sinks=[seen.append])
    probed, state, _ = fit(tmp_path / "probed", [callback], lambda: Gan(toggled))
    for place, probe in enumerate(callback.probes):
        losses = [row[f"optimizer{place}/loss"] for row in seen if f"optimizer{place}/loss" in row]
        assert losses == probe.frame()["loss"].tolist()
    assert_same_bits(state, expected)
    assert probed.calls == bare.calls
    for probe, reference in zip(callback.probes, bare.references, strict=True):
        assert_rows(probe.frame(), reference.rows, rel=1e-4)
    assert set(read_traces(tmp_path / "traces")["optimizer_index"]) == {0, 1}
    with pytest.raises(LandscapeError, match="2 probes"):
        _ = callback.probe


def test_optimizers_that_step_together(tmp_path):
    class Together(Gan):
        def training_step(self, batch, index):
            self.manual_backward(self.critic(self.generator(batch[0])).square().mean())
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    _, expected, _ = fit(tmp_path / "bare", [], Together)
    callback = LandscapeCallback(step_sizes=ETAS, together=True)
    _, state, _ = fit(tmp_path / "probed", [callback], Together)
    assert_same_bits(state, expected)
    assert len(callback.probe.frame()) == 14


def test_resumed_run(tmp_path):
    def saving(name):
        return lightning.callbacks.ModelCheckpoint(tmp_path / name, save_top_k=-1)

    def prepare(module):
        module.net[3].p = 0.0  # Lightning does not save the random state

    options = {"enable_checkpointing": True, "prepare": prepare}
    one = LandscapeCallback(step_sizes=ETAS, trace=tmp_path / "trace")
    _, expected, _ = fit(tmp_path, [one, saving("whole")], **options)
    rows = [*map(list, one.probe.frame()["losses"])]
    other = LandscapeCallback(step_sizes=ETAS, trace=tmp_path / "trace", resume=True)
    checkpoint = next((tmp_path / "whole").glob("*step=7.ckpt"))
    _, state, _ = fit(tmp_path, [other, saving("again")], ckpt_path=checkpoint, **options)
    del state["rng"], expected["rng"]
    assert_same_bits(state, expected)
    assert list(other.probe.frame()["step"]) == list(range(14))
    assert [*map(list, other.probe.frame()["losses"])] == rows


def test_training_that_fails_leaves_no_hooks(tmp_path):
    class Failing(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            self.optimizer = trainer.optimizers[0]
            if index == 2:
                raise RuntimeError("a failing callback")

    failing, callback = Failing(), LandscapeCallback(step_sizes=ETAS)
    with pytest.raises(RuntimeError, match="failing"):
        fit(tmp_path, [callback, failing])
    assert len(callback.probe.frame()) == 3
    assert not failing.optimizer._optimizer_step_pre_hooks


def test_compiled_module_is_refused(tmp_path):
    torch.compiler.reset()  # After many compilations in one process torch would run the model uncompiled.

    class Plain(Module):
        def training_step(self, batch, index):
            return self.criterion(self.net(batch[0]), batch[1])

    callback = LandscapeCallback(step_sizes=ETAS)
    trainer = make_trainer(tmp_path, [callback])
    with pytest.raises(LandscapeError, match=r"torch\.compile"):
        trainer.fit(torch.compile(Plain(), backend="aot_eager"), loader())


def test_what_cannot_be_measured_is_refused(tmp_path):
    class Own(lightning.strategies.SingleDeviceStrategy):
        handles_gradient_accumulation = True

    trainer = make_trainer(tmp_path, [LandscapeCallback()], strategy=Own(device=torch.device("cpu")))
    module = Module()
    with pytest.raises(LandscapeError, match="Own"):
        trainer.fit(module, loader())
    assert module.counts == {}
