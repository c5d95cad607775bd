"""A probed training on any device, beside its slow twin: copies of the model, moved point by point."""

import copy
import math
from contextlib import nullcontext

import torch

from landscape import LandscapeProbe

STEP_SIZES = [0.0, 0.05, -0.1, 0.4]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def accelerators(model):
    return sorted({p.device for p in model.parameters()} - {torch.device("cpu")}, key=str)


def streams(model):
    """Return the state of all random numbers that a forward pass of the model may draw."""
    return [torch.get_device_module(device).get_rng_state(device) for device in accelerators(model)]


def restore(model, states):
    for device, state in zip(accelerators(model), states, strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


def train(
    model,
    loss_of,
    batches,
    make=sgd,
    probed=True,
    criterion=None,
    checks_from=None,
    forbidden=nullcontext,
    between=lambda model: None,
    observes=False,
    **options,
):
    """Train, and return the probe and the losses that rows must have.

    Args:
        model: The model.
        loss_of: Function (model, batch) -> loss.
        batches: One for each update.
        make: Returns an optimizer of parameters.
        probed: False trains without a probe.
        criterion: That of the probe.
        checks_from: Update from which on the host must not wait.
        forbidden: Context in which it must not.
        between: Called with the model between backward pass and step.
        observes: True passes losses to the probe.
        options: Options of the probe.

    Returns:
        The probe or None, and a list of K losses for each update.
    """
    optimizer = make(model.parameters())
    probe = LandscapeProbe(model, optimizer, criterion, **{"step_sizes": STEP_SIZES} | options) if probed else None
    expected = []
    with probe or nullcontext():
        for update, batch in enumerate(batches):
            is_checked = checks_from is not None and update >= checks_from
            before = None if is_checked else (copy.deepcopy(model), streams(model))
            with forbidden() if is_checked else nullcontext():
                optimizer.zero_grad()
                loss = probe.observe(loss_of, batch) if observes and probe else loss_of(model, batch)
                loss.backward()
                between(model)
                if before:
                    expected.append(moved(model, *before, loss_of, batch))
                optimizer.step()
    return probe, expected


def moved(model, before, states, loss_of, batch):
    """Return the losses of copies from before the forward pass, moved along the gradient."""
    now, losses = streams(model), []
    for eta in STEP_SIZES:
        point = copy.deepcopy(before)
        with torch.no_grad():
            for parameter, trained in zip(point.parameters(), model.parameters(), strict=True):
                if trained.grad is not None:
                    parameter -= eta * trained.grad
        restore(model, states)
        losses.append(loss_of(point, batch).item())
    restore(model, now)
    return losses


def check_rows(probe, expected, rel=1e-9):
    """Assert that rows have the losses of the twin, and that the training loss is that at step size 0."""
    frame = probe.frame()
    assert list(frame["step"]) == list(range(len(expected)))
    for row, losses in zip(frame.to_dict("records"), expected, strict=True):
        assert all(math.isclose(one, other, rel_tol=rel) for one, other in zip(row["losses"], losses, strict=True)), (
            row["step"],
            row["losses"],
            losses,
        )
        assert math.isclose(row["loss"], losses[0], rel_tol=rel)
        assert row["grad_norm"] > 0
    return frame
