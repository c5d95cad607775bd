"""Trainers, optimizers and models of other libraries (the extra ``field``); skipped if not installed."""

import functools
import importlib
import os

import pytest
import torch
from lab import ENGINES, batches, check_rows, check_same_training, mlp
from torch import nn

from landscape import LandscapeProbe

CRITERION = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def import_library(name):
    """Import a library, or skip the test."""
    return pytest.importorskip(name)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [False, True])
def test_accelerate(accumulate, clip):
    accelerate = import_library("accelerate")

    def trial(lab):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = mlp().double()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with lab.attached(model, optimizer, CRITERION, engine="loop"):
            chunk = []
            for x, y in batches(4):
                with accelerator.accumulate(model):
                    if not chunk:
                        lab.copy_modules(model)
                    chunk.append((x, y))
                    loss = CRITERION(model(x), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        if clip:
                            accelerator.clip_grad_norm_(model.parameters(), 0.1)
                        everything, chunk = chunk, []

                        def total(m, everything=everything):
                            return sum(CRITERION(m(x), y) for x, y in everything) / len(everything)

                        lab.record_update(0, total)
                        lab.result.losses[-1] = lab.result.references[-1][0]
                    optimizer.step()
                    optimizer.zero_grad()
        lab.optimizer = optimizer.optimizer
        lab.record_state(model)

    check_rows(trial)


def test_fabric():
    fabric_module = import_library("lightning.fabric")

    def trial(lab):
        fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
        model = mlp().double()
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                fabric.backward(loss)
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    check_rows(trial)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate, tmp_path):
    lightning = import_library("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.criterion, self.kept = mlp().double(), nn.CrossEntropyLoss(), []

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            loss = self.criterion(self(batch[0]), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.kept.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Probing(lightning.Callback):
        def on_fit_start(self, trainer, module):
            self.probe = LandscapeProbe(
                module, trainer.optimizers[0], module.criterion, step_sizes=[0.0, 0.1], engine="auto"
            ).attach()

        def on_fit_end(self, trainer, module):
            self.probe.detach()

    def trial(lab):
        module, probing = Module(), Probing()
        data = torch.utils.data.DataLoader(
            [(x, y) for xs, ys in batches(4) for x, y in zip(xs, ys, strict=True)], batch_size=12
        )
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
            default_root_dir=tmp_path,
            callbacks=[probing] if lab.probed else [],
        )
        trainer.fit(module, data)
        lab.optimizer = trainer.optimizers[0]
        lab.record_state(module)
        lab.result.losses = module.kept
        if lab.probed:
            lab.result.frame = probing.probe.frame()

    result = check_same_training(trial)
    mean = torch.tensor(result.losses).reshape(-1, accumulate).mean(1).tolist()
    assert list(result.frame["loss"]) == pytest.approx(mean, rel=1e-6)
    assert [row[0] for row in result.frame["losses"]] == pytest.approx(mean, rel=1e-6)


def train(lab, make, direction="gradient"):
    model = mlp().double()
    optimizer = make(model)
    with lab.attached(model, optimizer, CRITERION, direction=direction, engine="loop"):
        for x, y in batches():
            lab.copy_modules(model)
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            loss.backward()
            if direction == "gradient":
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
            optimizer.step()
    lab.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lab.record_state(model)


def schedule_free(name, model):
    optimizer = getattr(import_library("schedulefree"), name)(model.parameters(), lr=0.01)
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedulefree(name):
    check_rows(functools.partial(train, make=functools.partial(schedule_free, name)))
    check_same_training(functools.partial(train, make=functools.partial(schedule_free, name), direction="update"))
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = schedule_free(name, model)
    with LandscapeProbe(model, optimizer, CRITERION, step_sizes=[0.1], direction="update") as probe:
        for x, y in batches():
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            size = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
            optimizer.step()
            assert probe.last()["grad_norm"] == pytest.approx(size, rel=1e-12)


NAMES = ["Lion", "AdaBelief", "Lamb", "Ranger21", "Lookahead", "Muon", "Prodigy", "SOAP"]


def make_optimizer(name, model):
    package = import_library("pytorch_optimizer")
    if name == "Lookahead":
        return package.Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=2)
    options = {"Ranger21": {"num_iterations": 10}, "Muon": {"lr": 0.01}}.get(name, {})
    groups = [{"params": list(model.parameters()), "use_muon": False}] if name == "Muon" else model.parameters()
    return getattr(package, name)(groups, **options)


@pytest.mark.parametrize("direction", ["gradient", "update"])
@pytest.mark.parametrize("name", NAMES)
def test_pytorch_optimizer(name, direction):
    trial = functools.partial(train, make=functools.partial(make_optimizer, name), direction=direction)
    if direction == "gradient":
        check_rows(trial)
    else:
        assert len(check_same_training(trial).frame) == 4


def test_pytorch_optimizer_sam():
    package = import_library("pytorch_optimizer")

    def trial(lab):
        model = mlp().double()
        optimizer = package.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():

                def closure(x=x, y=y):
                    loss = CRITERION(model(x), y)
                    loss.backward()
                    return loss

                lab.copy_modules(model)
                loss = closure()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step(closure)
                optimizer.zero_grad()
        lab.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lab.record_state(model)

    check_rows(trial)


@pytest.mark.parametrize("engine", ENGINES)
def test_monai(engine):
    """MONAI's network has each layer under several names."""
    networks, losses = import_library("monai.networks.nets"), import_library("monai.losses")

    def trial(lab):
        model = networks.DynUNet(
            2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8], deep_supervision=False
        ).double()
        criterion = losses.DiceCELoss(to_onehot_y=True, softmax=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with lab.attached(model, optimizer, criterion):
            for _ in range(3):
                x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
                y = (x > 0).double()
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: criterion(m(x), y))
                optimizer.step()
        lab.record_state(model)

    check_rows(trial, engine=engine)


def language_model():
    transformers = import_library("transformers")
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config).double()


def lora_model():
    peft = import_library("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    return peft.get_peft_model(language_model(), config)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [language_model, lora_model], ids=["transformers", "peft"])
def test_language_model(make, engine):
    """The model computes the loss, with dropout and tied embeddings."""

    def trial(lab):
        model = make().train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        with lab.attached(model, optimizer):
            for _ in range(3):
                tokens = torch.randint(0, 19, (2, 12))
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = lab.observe(lambda m, tokens: m(input_ids=tokens, labels=tokens).loss, tokens)
                loss.backward()
                lab.record_update(loss, lambda m, tokens=tokens: m(input_ids=tokens, labels=tokens).loss)
                optimizer.step()
        lab.record_state(model)

    check_rows(trial, engine=engine)


def test_libraries_installed():
    """CI installs the extra ``field``, and sets LANDSCAPE_FIELD to require it."""
    names = ["accelerate", "lightning", "monai", "peft", "pytorch_optimizer", "schedulefree", "transformers"]
    if not os.environ.get("LANDSCAPE_FIELD"):
        pytest.skip("LANDSCAPE_FIELD is not set, so that other libraries need not be installed")
    assert [importlib.import_module(name).__name__ for name in names] == names
