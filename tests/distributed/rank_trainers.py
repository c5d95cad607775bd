"""Trainers of other libraries under DistributedDataParallel, for ``test_trainers``."""

import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
STEP_SIZES = [0.05, 0.1, 0.4]


def reference(model, criterion, x, y):
    """Return the losses along the ray, means over the ranks, by moved copies of the model."""
    losses = []
    gradients = [parameter.grad for parameter in model.parameters()]
    for eta in [0.0, *STEP_SIZES]:
        values = [p - eta * g for p, g in zip(model.parameters(), gradients, strict=True)]
        named = dict(zip(dict(model.named_parameters()), values, strict=True))
        loss = criterion(torch.func.functional_call(model, named, (x,)), y).detach()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    return losses


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def examples():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, generator=generator), place % 3) for place in range(96)]


def accelerate_rows(ranks, folder):
    """The rows of a loop of Accelerate, and those of a plain loop."""
    from accelerate import Accelerator

    from landscape.integrations.accelerate import attach

    accelerator, criterion, expected = Accelerator(cpu=True), nn.CrossEntropyLoss(), []
    model = mlp()
    data = torch.utils.data.DataLoader(examples(), batch_size=12)
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    with attach(accelerator, model, optimizer, step_sizes=STEP_SIZES) as probe:
        for x, y in data:
            accelerator.backward(criterion(model(x), y))
            expected.append(reference(model.module, criterion, x, y))
            optimizer.step()
            optimizer.zero_grad()
    frame = probe.frame()
    return [[row["loss"], *row["losses"]] for _, row in frame.iterrows()], expected


class Network(nn.Module):
    """A model whose loss is its own, as in Transformers."""

    def __init__(self):
        super().__init__()
        self.net, self.criterion = mlp(), nn.CrossEntropyLoss()

    def forward(self, x, labels):
        return {"loss": self.criterion(self.net(x), labels)}


def transformers_rows(ranks, folder):
    """The same of the Trainer of Transformers."""
    import transformers

    from landscape.integrations.transformers import attach

    expected, seen, criterion = [], {}, nn.CrossEntropyLoss()

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.update(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Reference(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            expected.append(reference(model.net, criterion, seen["x"], seen["labels"]))

    warnings.simplefilter("ignore")
    arguments = transformers.TrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        num_train_epochs=1,
        learning_rate=0.1,
        disable_tqdm=True,
        max_grad_norm=0.1,
    )
    data = [{"x": x, "labels": y} for x, y in examples()]
    trainer = Trainer(Network(), arguments, train_dataset=data, callbacks=[Reference()])
    attached = attach(trainer, step_sizes=STEP_SIZES)
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    frame = attached.probe.frame()
    return [[row["loss"], *row["losses"]] for _, row in frame.iterrows()], expected


def lightning_rows(ranks, folder):
    """The same of Lightning."""
    import lightning.pytorch as lightning

    from landscape.integrations.lightning import LandscapeCallback

    expected, criterion = [], nn.CrossEntropyLoss()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, index):
            self.batch = batch
            return criterion(self.net(batch[0]), batch[1])

        def on_after_backward(self):
            expected.append(reference(self.net, criterion, *self.batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = LandscapeCallback(step_sizes=STEP_SIZES)
    trainer = lightning.Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(examples(), batch_size=12))
    frame = callback.probe.frame()
    return [[row["loss"], *row["losses"]] for _, row in frame.iterrows()], expected


TASKS = [accelerate_rows, transformers_rows, lightning_rows]
