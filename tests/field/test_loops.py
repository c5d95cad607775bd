"""Common training loops: an update has the losses whose gradient the optimizer gets."""

import functools
import itertools
import warnings

import pytest
import torch
from lab import ENGINES, STEP_SIZES, Lab, batches, check_rows, check_same_training, mlp, run
from torch import nn

from landscape import LandscapeError, LandscapeProbe
from landscape.probe import checks

CRITERION = nn.CrossEntropyLoss()
ZEROS = {
    "to None": lambda model, optimizer: optimizer.zero_grad(set_to_none=True),
    "in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "of the model": lambda model, optimizer: model.zero_grad(),
    "through data": lambda model, optimizer: [p.grad.data.zero_() for p in model.parameters() if p.grad is not None],
    "new zeros": lambda model, optimizer: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()],
}
ORDERS = {
    "zero, forward, backward": "zfb",
    "forward, zero, backward": "fzb",
    "forward, backward, step, zero": "fbz",
}


def made(rate=0.1):
    model = mlp().double()
    return model, torch.optim.SGD(model.parameters(), lr=rate)


def train_skipping(lab, order, zero, skipped):
    """Skip updates, as after a spike of the gradient's norm."""
    model, optimizer = made()
    with lab.attached(model, optimizer, CRITERION):
        for step, (x, y) in enumerate(batches(6)):
            for letter in order:
                if letter == "z" and order != "fbz":
                    ZEROS[zero](model, optimizer)
                elif letter == "f":
                    lab.copy_modules(model)
                    loss = CRITERION(model(x), y)
                elif letter == "b":
                    loss.backward()
            if step not in skipped:
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
            if order == "fbz":
                ZEROS[zero](model, optimizer)
    lab.record_state(model)


@pytest.mark.parametrize("skipped", [(), (0,), (2, 3), (1, 3, 4)], ids=str)
@pytest.mark.parametrize(("order", "zero"), list(itertools.product(ORDERS, ZEROS)))
def test_skipped_updates(order, zero, skipped):
    check_rows(functools.partial(train_skipping, order=ORDERS[order], zero=zero, skipped=skipped), engine="loop")


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("zero", ["to None", "in place"])
@pytest.mark.parametrize("order", ["zfb", "fzb"])
def test_loss_scaler_skipped_updates(order, zero, clip):
    def trial(lab):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
        with lab.attached(model, optimizer, CRITERION, grad_scaler=scaler):
            for step, (x, y) in enumerate(batches(6)):
                overflows = step in (0, 2, 3)
                x = x * float("inf") if overflows else x
                for letter in order:
                    if letter == "z":
                        ZEROS[zero](model, optimizer)
                    elif letter == "f":
                        lab.copy_modules(model)
                        loss = CRITERION(model(x), y)
                    else:
                        scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                if not overflows:
                    lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                scaler.step(optimizer)
                scaler.update()
        lab.record_state(model)

    check_rows(trial)


def train_scaled(lab, clip, by_hand, **options):
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with lab.attached(model, optimizer, CRITERION, **options):
        for x, y in batches():
            lab.copy_modules(model)
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            if by_hand:
                (128 * loss).backward()
                for parameter in model.parameters():
                    parameter.grad /= 128
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
            scaler.step(optimizer) if not by_hand else optimizer.step()
            scaler.update() if not by_hand else None
    lab.record_state(model)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_loss_scale(clip, by_hand, engine):
    """A scaler is found by its call of the optimizer; of a scale by hand the probe must be told."""
    scaled = functools.partial(train_scaled, clip=clip, by_hand=by_hand)
    if by_hand:
        with pytest.raises(LandscapeError, match="grad_scaler="):
            run(scaled, True, engine=engine)
    remedy = torch.amp.GradScaler("cpu", init_scale=128.0)
    check_rows(functools.partial(scaled, grad_scaler=remedy), engine=engine, alone=not by_hand)


def test_loss_scale_by_hand_without_criterion():
    with pytest.raises(LandscapeError, match="grad_scaler="):
        run(functools.partial(train_scaled, clip=False, by_hand=True), True, alone=True)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("zero", ZEROS)
def test_gradient_accumulation(zero, rows):
    """Each update is the mean over micro-batches; the last may have only one."""

    def trial(lab):
        model, optimizer = made()
        data = list(batches(7))
        with lab.attached(model, optimizer, CRITERION, engine="loop"):
            for start in range(0, 7, rows):
                chunk = data[start : start + rows]
                lab.copy_modules(model)
                ZEROS[zero](model, optimizer)
                losses = []
                for x, y in chunk:
                    losses.append(CRITERION(model(x), y) / len(chunk))
                    losses[-1].backward()

                def total(m, chunk=chunk):
                    return sum(CRITERION(m(x), y) / len(chunk) for x, y in chunk)

                lab.record_update(sum(losses), total)
                optimizer.step()
        lab.record_state(model)

    check_rows(trial)


def sign_by_grad(model, x, y):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(CRITERION(model(x), y), x)
    return slope.sign()


def sign_by_backward(model, x, y, optimizer):
    """An attack by backward() and zero_grad()."""
    x = x.clone().requires_grad_()
    CRITERION(model(x), y).backward()
    optimizer.zero_grad()
    return x.grad.sign()


def sign_by_inputs(model, x, y):
    x = x.clone().requires_grad_()
    CRITERION(model(x), y).backward(inputs=[x])
    return x.grad.sign()


@pytest.mark.parametrize("attack", ["autograd.grad", "backward", "inputs"])
def test_adversarial_attack(attack):
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                optimizer.zero_grad()
                if attack == "backward":
                    sign = sign_by_backward(model, x, y, optimizer)
                else:
                    sign = (sign_by_grad if attack == "autograd.grad" else sign_by_inputs)(model, x, y)
                adversarial = x + 0.1 * sign
                lab.copy_modules(model)
                loss = CRITERION(model(adversarial), y)
                loss.backward()
                lab.record_update(loss, lambda m, x=adversarial, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    check_rows(trial, engine="loop")


BACKWARDS = {
    "twice": lambda loss, model: (loss.backward(retain_graph=True), loss.backward()),
    "torch.autograd": lambda loss, model: torch.autograd.backward([loss]),
    "gradient": lambda loss, model: loss.backward(torch.full_like(loss, 2.0)),
    "factors": lambda loss, model: torch.autograd.backward(
        [loss, loss], [torch.ones_like(loss), torch.ones_like(loss)]
    ),
    "to parameters": lambda loss, model: (2 * loss).backward(inputs=list(model.parameters())),
    "divided in place": lambda loss, model: loss.mul_(2).backward(),
}


@pytest.mark.parametrize("how", BACKWARDS)
def test_backward_variants(how):
    """Each variant differentiates twice the loss."""

    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                value = 2 * loss.item()
                if how == "torch.autograd":
                    loss = 2 * loss
                BACKWARDS[how](loss, model)
                lab.record_update(value, lambda m, x=x, y=y: 2 * CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    result = check_rows(trial)
    assert not result.warnings


def train_with_step_hook(lab):
    """Clip the gradient in a step hook that is registered after the probe."""
    model, optimizer = made()

    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    with lab.attached(model, optimizer, CRITERION):
        optimizer.register_step_pre_hook(clip)
        for x, y in batches():
            lab.copy_modules(model)
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            loss.backward()
            clip()  # The hook clips again, which changes 1e-6 of it.
            lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
            optimizer.step()
    lab.record_state(model)


def test_step_hook_after_probe():
    result = check_rows(train_with_step_hook, rel=1e-4)
    assert list(result.frame["grad_norm"]) == pytest.approx([0.01] * 4, rel=1e-3)


def test_step_hook_after_forward():
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches()):
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                if step == 1:
                    optimizer.register_step_pre_hook(lambda *_: None)
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    check_rows(trial, missing=[1], alone_missing=[1])


CHANGED = {
    "clipped by value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "masked": lambda model: model[0].weight.grad.mul_(torch.arange(6) % 2),
    "noise": lambda model: [p.grad.add_(0.1 * torch.randn_like(p)) for p in model.parameters()],
}


@pytest.mark.parametrize("how", CHANGED)
def test_gradient_changed_after_backward(how):
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                CHANGED[how](model)
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    result = check_rows(trial)
    assert sum("gradient" in message for message in result.warnings) == 1


def without_zero_grad(model, loss, step):
    """Call no zero_grad between two updates."""
    loss.backward()


def separate_penalty(model, loss, step):
    loss.backward()
    if step:
        (1e-9 * model[0].weight.square().sum()).backward()


def decay_before_step(model, loss, step):
    loss.backward()
    if step:
        with torch.no_grad():
            model[0].weight.mul_(0.9)


WRONG = {
    "no zero_grad": without_zero_grad,
    "another pass": separate_penalty,
    "written before the step": decay_before_step,
}


@pytest.mark.parametrize("how", WRONG)
def test_update_of_no_loss(how):
    """A second backward pass is refused by the loop alone."""

    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches()):
                lab.copy_modules(model)
                if how != "no zero_grad":
                    optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                WRONG[how](model, loss, step)
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    missing = [1, 2, 3]
    alone_missing = [] if how == "another pass" else missing
    result = check_rows(trial, missing, rel=1e-8, engine="loop", alone_missing=alone_missing)
    assert any("Step" in message for message in result.warnings)


def train_changing_input(lab, begin, updates):
    """Overwrite an input through ``.data``, from an update on, so that another loss is evaluated."""
    model, optimizer = made()
    with lab.attached(model, optimizer):
        for step, (x, y) in enumerate(batches(updates)):
            optimizer.zero_grad()
            scale = torch.ones(6, dtype=torch.float64)
            lab.observe(lambda m, x, y, scale=scale: CRITERION(m(x * scale), y), x, y).backward()
            if begin <= step < updates - 2:
                scale.data[0] = 3.0
            optimizer.step()


def test_check_fails_late(monkeypatch):
    """The failed check is that of step 10 if no update before it is suspicious."""
    monkeypatch.setattr(checks, "_matches_slope", lambda row: True)
    result = run(
        functools.partial(train_changing_input, begin=5, updates=14), True, step_sizes=[0.05, 0.1], engine="loop"
    )
    assert list(result.frame["step"]) == [*range(10), 12, 13]
    (message,) = (message for message in result.warnings if "Step 10" in message)
    assert "1 to 9" in message


def test_check_suspicious_losses():
    """An update is suspicious long before the check of step 100."""
    result = run(
        functools.partial(train_changing_input, begin=22, updates=28), True, step_sizes=[0.05, 0.1], engine="loop"
    )
    assert list(result.frame["step"]) == [*range(22), 26, 27]
    (message,) = (message for message in result.warnings if "Step 22" in message)
    assert "21" in message


def test_check_loss_at_zero():
    result = run(
        functools.partial(train_changing_input, begin=3, updates=8), True, step_sizes=[0.0, 0.1], engine="loop"
    )
    assert list(result.frame["step"]) == [0, 1, 2, 6, 7]


def test_no_step_warning():
    def trial(lab):
        model, optimizer = made()
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                other.zero_grad()
                CRITERION(model(x), y).backward()
                other.step()
        lab.record_state(model)

    result = check_same_training(trial)
    assert len(result.frame) == 0
    assert len(result.warnings) == 1


def test_no_step_warning_after_error():
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            x, y = next(batches())
            CRITERION(model(x), y).backward()
            raise KeyError

    with warnings.catch_warnings(record=True) as caught, pytest.raises(KeyError):  # noqa: PT012
        warnings.simplefilter("always")
        trial(Lab(True))
    assert not caught


def test_backward_restored():
    original = torch.autograd.backward
    model, optimizer = made()
    with LandscapeProbe(model, optimizer, CRITERION, step_sizes=STEP_SIZES):
        assert torch.autograd.backward is not original
    assert torch.autograd.backward is original
