"""Loops as people write them: the losses of an update are those whose gradient the optimizer gets."""

import functools
import itertools
import warnings

import pytest
import torch
from lab import STEP_SIZES, Lab, batches, check_rows, check_untouched, mlp, run
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


def skipping(lab, order, zero, skipped):
    """An update is skipped by the loop, as where the gradient's norm has a spike."""
    model, optimizer = made()
    with lab.attached(model, optimizer, CRITERION):
        for step, (x, y) in enumerate(batches(6)):
            for letter in order:
                if letter == "z" and order != "fbz":
                    ZEROS[zero](model, optimizer)
                elif letter == "f":
                    lab.before(model)
                    loss = CRITERION(model(x), y)
                elif letter == "b":
                    loss.backward()
            if step not in skipped:
                lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
            if order == "fbz":
                ZEROS[zero](model, optimizer)
    lab.left(model)


@pytest.mark.parametrize("skipped", [(), (0,), (2, 3), (1, 3, 4)], ids=str)
@pytest.mark.parametrize(("order", "zero"), list(itertools.product(ORDERS, ZEROS)))
def test_updates_that_the_loop_skips(order, zero, skipped):
    check_rows(functools.partial(skipping, order=ORDERS[order], zero=zero, skipped=skipped), engine="loop")


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("zero", ["to None", "in place"])
@pytest.mark.parametrize("order", ["zfb", "fzb"])
def test_updates_that_a_loss_scaler_skips(order, zero, clip):
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
                        lab.before(model)
                        loss = CRITERION(model(x), y)
                    else:
                        scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                if not overflows:
                    lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                scaler.step(optimizer)
                scaler.update()
        lab.left(model)

    check_rows(trial)


def scaled(lab, clip, by_hand, **options):
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with lab.attached(model, optimizer, CRITERION, **options):
        for x, y in batches():
            lab.before(model)
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
            lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
            scaler.step(optimizer) if not by_hand else optimizer.step()
            scaler.update() if not by_hand else None
    lab.left(model)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_a_scale_that_is_not_handed_over_is_refused_and_the_remedy_helps(clip, by_hand):
    with pytest.raises(LandscapeError, match="grad_scaler="):
        run(functools.partial(scaled, clip=clip, by_hand=by_hand), True)
    remedy = torch.amp.GradScaler("cpu", init_scale=128.0)
    check_rows(functools.partial(scaled, clip=clip, by_hand=by_hand, grad_scaler=remedy))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("zero", ZEROS)
def test_accumulation(zero, rows):
    """Each update is the mean over micro-batches, of which the last one may be alone."""

    def trial(lab):
        model, optimizer = made()
        data = list(batches(7))
        with lab.attached(model, optimizer, CRITERION, engine="loop"):
            for start in range(0, 7, rows):
                chunk = data[start : start + rows]
                lab.before(model)
                ZEROS[zero](model, optimizer)
                losses = []
                for x, y in chunk:
                    losses.append(CRITERION(model(x), y) / len(chunk))
                    losses[-1].backward()

                def total(m, chunk=chunk):
                    return sum(CRITERION(m(x), y) / len(chunk) for x, y in chunk)

                lab.update(sum(losses), total)
                optimizer.step()
        lab.left(model)

    check_rows(trial)


def gradient_sign(model, x, y):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(CRITERION(model(x), y), x)
    return slope.sign()


def projected(model, x, y, optimizer):
    """Attacks by backward(), as those who wrote it before autograd.grad was known."""
    x = x.clone().requires_grad_()
    CRITERION(model(x), y).backward()
    optimizer.zero_grad()
    return x.grad.sign()


def with_inputs(model, x, y):
    x = x.clone().requires_grad_()
    CRITERION(model(x), y).backward(inputs=[x])
    return x.grad.sign()


@pytest.mark.parametrize("attack", ["autograd.grad", "backward", "inputs"])
def test_attacks_are_no_losses_of_an_update(attack):
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                optimizer.zero_grad()
                if attack == "backward":
                    sign = projected(model, x, y, optimizer)
                else:
                    sign = (gradient_sign if attack == "autograd.grad" else with_inputs)(model, x, y)
                adversarial = x + 0.1 * sign
                lab.before(model)
                loss = CRITERION(model(adversarial), y)
                loss.backward()
                lab.update(loss, lambda m, x=adversarial, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.left(model)

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
def test_backward_in_every_way(how):
    """Each differentiates two times the loss."""

    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.before(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                value = 2 * loss.item()
                if how == "torch.autograd":
                    loss = 2 * loss
                BACKWARDS[how](loss, model)
                lab.update(value, lambda m, x=x, y=y: 2 * CRITERION(m(x), y))
                optimizer.step()
        lab.left(model)

    result = check_rows(trial)
    assert not result.said


def hooked(lab):
    """A step hook that is registered after the probe clips the gradient."""
    model, optimizer = made()

    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    with lab.attached(model, optimizer, CRITERION):
        optimizer.register_step_pre_hook(clip)
        for x, y in batches():
            lab.before(model)
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            loss.backward()
            clip()  # once more by the hook, which changes a millionth
            lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
            optimizer.step()
    lab.left(model)


def test_gradients_that_a_later_hook_changes():
    result = check_rows(hooked, rel=1e-4)
    assert list(result.frame["grad_norm"]) == pytest.approx([0.01] * 4, rel=1e-3)


def test_a_hook_that_comes_between_forward_pass_and_step_leaves_one_update_out():
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches()):
                lab.before(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                if step == 1:
                    optimizer.register_step_pre_hook(lambda *_: None)
                lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.left(model)

    check_rows(trial, missing=[1])


CHANGED = {
    "clipped by value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "masked": lambda model: model[0].weight.grad.mul_(torch.arange(6) % 2),
    "noise": lambda model: [p.grad.add_(0.1 * torch.randn_like(p)) for p in model.parameters()],
}


@pytest.mark.parametrize("how", CHANGED)
def test_gradients_that_are_changed_after_the_pass_are_followed_and_told(how):
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.before(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                CHANGED[how](model)
                lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.left(model)

    result = check_rows(trial)
    assert sum("gradient" in words for words in result.said) == 1


def left_alone(model, loss, step):
    """No zero_grad between two updates."""
    loss.backward()


def separate_penalty(model, loss, step):
    loss.backward()
    if step:
        (1e-9 * model[0].weight.square().sum()).backward()


def decayed(model, loss, step):
    loss.backward()
    if step:
        with torch.no_grad():
            model[0].weight.mul_(0.9)


WRONG = {"gradients that stay": left_alone, "another pass": separate_penalty, "written before the step": decayed}


@pytest.mark.parametrize("how", WRONG)
def test_updates_that_are_of_no_loss_are_left_out_and_told(how):
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches()):
                lab.before(model)
                if how != "gradients that stay":
                    optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                WRONG[how](model, loss, step)
                lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.left(model)

    result = check_rows(trial, missing=[1, 2, 3])
    assert [words for words in result.said if "Step" in words] != []


def changing(lab, begin, updates):
    """What the loss reads is overwritten without a trace, from an update on, so that another loss is evaluated."""
    model, optimizer = made()
    with lab.attached(model, optimizer):
        for step, (x, y) in enumerate(batches(updates)):
            optimizer.zero_grad()
            scale = torch.ones(6, dtype=torch.float64)
            lab.observe(lambda m, x, y, scale=scale: CRITERION(m(x * scale), y), x, y).backward()
            if begin <= step < updates - 2:
                scale.data[0] = 3.0
            optimizer.step()


def test_a_check_that_fails_late_names_the_rows_before_it(monkeypatch):
    """At step 10, if nothing raises a doubt before."""
    monkeypatch.setattr(checks, "_falls_as_promised", lambda row: True)
    result = run(functools.partial(changing, begin=5, updates=14), True, step_sizes=[0.05, 0.1])
    assert list(result.frame["step"]) == [*range(10), 12, 13]
    (words,) = (words for words in result.said if "Step 10" in words)
    assert "1 to 9" in words


def test_losses_that_do_not_fall_as_the_gradient_says_are_checked():
    """Long before step 100; no check is due at once after the last one."""
    result = run(functools.partial(changing, begin=22, updates=28), True, step_sizes=[0.05, 0.1])
    assert list(result.frame["step"]) == [*range(22), 26, 27]
    (words,) = (words for words in result.said if "Step 22" in words)
    assert "21" in words


def test_a_loss_at_step_size_0_that_is_not_the_training_loss_is_left_out_at_once():
    result = run(functools.partial(changing, begin=3, updates=8), True, step_sizes=[0.0, 0.1])
    assert list(result.frame["step"]) == [0, 1, 2, 6, 7]


def test_losses_without_a_step_are_told():
    def trial(lab):
        model, optimizer = made()
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                other.zero_grad()
                CRITERION(model(x), y).backward()
                other.step()
        lab.left(model)

    result = check_untouched(trial)
    assert len(result.frame) == 0
    assert len(result.said) == 1


def test_a_training_that_ends_by_an_error_is_not_told_of_its_steps():
    def trial(lab):
        model, optimizer = made()
        with lab.attached(model, optimizer, CRITERION):
            x, y = next(batches())
            CRITERION(model(x), y).backward()
            raise KeyError

    with warnings.catch_warnings(record=True) as said, pytest.raises(KeyError):  # noqa: PT012
        warnings.simplefilter("always")
        trial(Lab(True))
    assert not said


def test_autograd_is_what_it_was_after_the_last_probe():
    original = torch.autograd.backward
    model, optimizer = made()
    with LandscapeProbe(model, optimizer, CRITERION, step_sizes=STEP_SIZES):
        assert torch.autograd.backward is not original
    assert torch.autograd.backward is original
