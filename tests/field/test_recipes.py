"""The scripts of docs/recipes run, and their rows are the losses of moved copies of the model."""

import copy
import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

PAGES = Path(__file__).parents[2] / "docs" / "recipes"
REQUIRED = {"lora": ["peft", "transformers"], "schedule_free": ["schedulefree"]}
"""Libraries of the extra ``field`` by page."""


@dataclass(frozen=True)
class Recorded:
    """A probe of a page, by the names in its script, and the loss of its updates.

    ``loss`` gets the moved model, and then copies of the variables that its other arguments name, as they are when the
    optimizer steps.
    """

    loss: Callable
    probe: str = "probe"
    optimizer: str = "optimizer"
    model: str = "model"
    clip: float = float("inf")


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def penalized(model, x, y):
    return F.cross_entropy(model(x), y) + 1e-4 * sum(p.square().sum() for p in model.parameters())


def per_token(model, microbatches):
    tokens, labels = (torch.cat(part) for part in zip(*microbatches, strict=True))
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100)


def generator_loss(generator, discriminator, noise):
    return -F.logsigmoid(discriminator(generator(noise))).mean()


def discriminator_loss(discriminator, real, fake):
    return -F.logsigmoid(discriminator(real)).mean() - F.logsigmoid(-discriminator(fake)).mean()


def info_nce(model, first, second):
    """Compute the loss of SimCLR sample by sample."""
    z = F.normalize(torch.cat([model(first), model(second)]), dim=1)
    losses = []
    for i in range(len(z)):
        others = torch.cat([z[:i], z[i + 1 :]])
        losses.append((others @ z[i] / 0.5).logsumexp(0) - z[i] @ z[(i + len(first)) % len(z)] / 0.5)
    return torch.stack(losses).mean()


def language_loss(model, batch):
    return F.cross_entropy(model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


RECORDED = {
    "closures": [Recorded(penalized)],
    "contrastive": [Recorded(info_nce)],
    "gan": [
        Recorded(generator_loss, "first", "generator_optimizer", "generator"),
        Recorded(discriminator_loss, "second", "discriminator_optimizer", "discriminator"),
    ],
    "lora": [Recorded(language_loss, clip=1.0)],
    "sam": [Recorded(cross_entropy)],
    "schedule_free": [Recorded(cross_entropy)],
    "torchtitan": [Recorded(per_token, clip=1.0)],
}


def moved_losses(recorded, variables, step_sizes):
    """Compute the losses at copies of the model that were moved along the gradient of its own loss."""
    model, *others = variables
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(recorded.loss(model, *others), trained)
    share = min(1.0, recorded.clip / (torch.nn.utils.get_total_norm(gradients).item() + 1e-6))
    losses = []
    for eta in step_sizes:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, gradient in zip((p for p in moved.parameters() if p.requires_grad), gradients, strict=True):
                parameter -= eta * share * gradient
            losses.append(recorded.loss(moved, *others).item())
    return losses


def run_page(name, on_step=lambda names, optimizer: None):
    """Run the script of a page; call ``on_step`` with its variables before each step of an optimizer.

    The steps that an optimizer makes within its own step do not count.
    """
    (script,) = re.findall(r"^```python\n(.*?)^```", (PAGES / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE)
    names = {"__name__": "__main__"}
    within = []

    def before(optimizer, *_):
        if not within:
            on_step(names, optimizer)
        within.append(optimizer)

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(lambda *_: within.pop())]
    try:
        exec(compile(script, f"docs/recipes/{name}.md", "exec"), names)
    finally:
        for handle in handles:
            handle.remove()
    return names


@pytest.fixture
def page(request, tmp_path, monkeypatch):
    """A page whose libraries are installed, and an empty folder to run it in."""
    if absent := [library for library in REQUIRED.get(request.param, []) if not importlib.util.find_spec(library)]:
        pytest.skip(f"{', '.join(absent)}: not installed; the extra field has it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if request.param in REQUIRED:
            warnings.simplefilter("ignore")  # of the libraries, about themselves
        yield request.param


@pytest.mark.slow
@pytest.mark.parametrize("page", RECORDED, indirect=True)
def test_rows_are_losses_of_moved_copies(page):
    kept = {recorded: [] for recorded in RECORDED[page]}

    def keep(names, optimizer):
        for recorded, updates in kept.items():
            if optimizer is names[recorded.optimizer]:
                _, *others = inspect.signature(recorded.loss).parameters
                updates.append(copy.deepcopy([names[name] for name in (recorded.model, *others)]))

    names = run_page(page, keep)
    for recorded, updates in kept.items():
        frame = names[recorded.probe].frame()
        assert list(frame["step"]) == list(range(len(updates)))
        for row, variables in zip(frame.to_dict("records"), updates, strict=True):
            expected = moved_losses(recorded, variables, [0.0, *row["step_sizes"]])
            np.testing.assert_allclose([row["loss"], *row["losses"]], expected, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["timm"], indirect=True)
def test_rows_are_means_of_accumulated_batches(page):
    names = run_page(page)
    frame = names["probe"].frame()
    expected = np.reshape(names["losses"], (-1, names["accumulate"])).mean(1)
    np.testing.assert_allclose(frame["loss"], expected, rtol=1e-6)
    assert np.isfinite(np.stack(frame["losses"])).all()
    assert (frame["lr"].diff().dropna() < 0).all()


def test_every_page_is_tested():
    assert {path.stem for path in PAGES.glob("*.md")} == {*RECORDED, "timm", "index"}
