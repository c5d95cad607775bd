"""Features of real trainings: schedules, checkpoints, sparse gradients, caught errors, layers added later."""

import copy
import functools
import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from lab import batches, check_rows, mlp, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from landscape import LandscapeError, LandscapeProbe

CRITERION = nn.CrossEntropyLoss()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def trial(lab, make=lambda: mlp().double(), optimize=sgd, begin=None, after=None, total=None, updates=5, **options):
    """Train in a plain loop.

    ``begin`` is called before each update, ``after`` between its backward pass and its step.
    """
    model = make()
    optimizer = optimize(model)
    total = total or (lambda m, x, y: CRITERION(m(x), y))
    with lab.attached(model, optimizer, CRITERION, **options):
        for step, (x, y) in enumerate(batches(updates)):
            if begin:
                begin(step, model, optimizer)
            lab.copy_modules(model)
            optimizer.zero_grad()
            loss = total(model, x, y)
            loss.backward()
            if after:
                after(model, x, y)
            lab.record_update(loss, lambda m, x=x, y=y: total(m, x, y))
            optimizer.step()
    lab.record_state(model)


class Checkpointed(nn.Module):
    """A model with a checkpointed layer with dropout."""

    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant else x
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class SparseEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.embedding((x[:, 0].abs() * 10).long().clamp(max=49)))


def freeze(step, model, optimizer):
    model[0].requires_grad_(step < 2)


def join(step, model, optimizer):
    if step == 2:
        optimizer.add_param_group({"params": list(model[0].parameters())})


def load(step, model, optimizer):
    if step == 2:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        optimizer.load_state_dict(optimizer.state_dict())


def copied(step, model, optimizer):
    copy.deepcopy(model)
    copy.deepcopy(optimizer)


def evaluate(model, x, y):
    model.eval()
    CRITERION(model(x + 1), y)
    with torch.no_grad():
        CRITERION(model(x), y)
    model.train()


def norm_in_evaluation():
    model = mlp().double()
    model[1].eval()
    return model


FEATURES = {
    "checkpoints": {"make": lambda: Checkpointed(False).double()},
    "reentrant checkpoints": {"make": lambda: Checkpointed(True).double()},
    "sparse gradients": {"make": lambda: SparseEmbedding().double()},
    "cumulative averages": {"make": lambda: nn.Sequential(nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3)).double()},
    "a norm in evaluation mode": {"make": norm_in_evaluation},
    "frozen later": {"begin": freeze},
    "added to the optimizer later": {
        "optimize": lambda model: torch.optim.SGD(model[3].parameters(), lr=0.1),
        "begin": join,
    },
    "loaded states": {"begin": load},
    "copies": {"begin": copied},
    "evaluation between": {"after": evaluate},
}


@pytest.mark.parametrize("name", FEATURES)
def test_training_features(name):
    check_rows(functools.partial(trial, **FEATURES[name]))


def test_gradients_with_reentrant_checkpoints():
    with pytest.raises(LandscapeError, match="use_reentrant=False"):
        run(functools.partial(trial, make=lambda: Checkpointed(True).double(), gradients=True), True)


def test_learning_rate_schedule():
    def scheduled(lab):
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=8)
        rates = []
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches(6):
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
        lab.record_state(model)
        lab.result.rates = rates

    result = check_rows(scheduled)
    assert list(result.frame["lr"]) == result.rates


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, hidden=None):
        outputs, hidden = self.cell(x[:, None], hidden)
        return self.head(outputs[:, -1]), hidden


class FirstOutput(nn.Module):
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs[0], targets)


def test_detached_hidden_state():
    def truncated(lab):
        model, criterion, hidden = Recurrent().double(), FirstOutput(), None
        optimizer = sgd(model)
        with lab.attached(model, optimizer, criterion):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                outputs = model(x, hidden)
                loss = criterion(outputs, y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y, hidden=hidden: criterion(m(x, hidden), y))
                hidden = outputs[1].detach()
                optimizer.step()
        lab.record_state(model)

    check_rows(truncated)


def test_errors_caught_by_the_loop():
    """Fail in the forward pass of one update and in the backward pass of another."""

    def catching(lab):
        model = mlp().double()
        optimizer = sgd(model)

        def fail(gradient):
            raise ZeroDivisionError

        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches(8)):
                lab.copy_modules(model)
                optimizer.zero_grad(set_to_none=False)
                hook = model[3].weight.register_hook(fail) if step == 4 else None
                try:
                    loss = CRITERION(model(x[:, :3] if step == 2 else x), y)
                    loss.backward()
                except (RuntimeError, ZeroDivisionError):
                    continue
                finally:
                    if hook is not None:
                        hook.remove()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    check_rows(catching)


def test_detach_and_attach():
    def pausing(lab):
        model = mlp().double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches(8)):
                if lab.probe and step == 3:
                    lab.probe.detach()
                if lab.probe and step == 5:
                    lab.probe.attach()
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                if step not in (3, 4):
                    lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    check_rows(pausing)


def test_critic_with_gradient_penalty():
    def total(model, real, false):
        mixed = (0.3 * real + 0.7 * false).requires_grad_()
        (slope,) = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
        return model(false).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    def critic(lab):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer):
            for real, _ in batches():
                false = torch.randn_like(real)
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = lab.observe(total, real, false)
                loss.backward()
                lab.record_update(loss, lambda m, real=real, false=false: total(m, real, false))
                optimizer.step()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.clamp_(-0.5, 0.5)
        lab.record_state(model)

    check_rows(critic)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_retained_graph():
    """A loss is differentiated, its gradient cleared, and differentiated again with a graph."""

    def keeping(lab):
        model = mlp().double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward(retain_graph=True)
                optimizer.zero_grad()
                loss.backward(create_graph=True)
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
            optimizer.zero_grad()
        lab.record_state(model)

    check_rows(keeping)


def test_gradients_set_by_the_loop():
    """The loop cannot distinguish them from gradients of an attack."""

    def by_hand(lab):
        model = mlp().double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.copy_modules(model)
                loss = CRITERION(model(x), y)
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    with pytest.raises(LandscapeError, match=r"loss\.backward"):
        run(by_hand, True, engine="loop")
    check_rows(by_hand)


def test_trainings_in_threads():
    def train(results, number, probed):
        torch.manual_seed(number)
        model, criterion = results[number]["model"], nn.CrossEntropyLoss()
        optimizer, losses = sgd(model), []
        probe = LandscapeProbe(model, optimizer, criterion, step_sizes=[0.0, 0.1], engine="loop")
        if probed:
            probe.attach()
        else:
            probe.detach()
        for x, y in batches(30, seed=number):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        if probed:
            probe.detach()
        results[number] |= {"losses": losses, "frame": probe.frame()}

    def both(probed):
        results = [{"model": mlp().double()} for _ in range(2)]
        for number, result in enumerate(results):
            torch.manual_seed(number)
            for parameter in result["model"].parameters():
                nn.init.uniform_(parameter)
        threads = [threading.Thread(target=train, args=(results, number, probed)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    for probed, bare in zip(both(True), both(False), strict=True):
        assert probed["losses"] == bare["losses"]
        for (name, tensor), expected in zip(
            probed["model"].state_dict().items(), bare["model"].state_dict().values(), strict=True
        ):
            assert torch.equal(tensor, expected), name
        assert list(probed["frame"]["loss"]) == pytest.approx(probed["losses"], rel=1e-9)
        assert [row[0] for row in probed["frame"]["losses"]] == pytest.approx(probed["losses"], rel=1e-9)


class RecurrentCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(9, 3), nn.Linear(3, 3)

    def forward(self, x, hidden):
        hidden = torch.tanh(self.cell(torch.cat([x, hidden], 1)))
        return self.head(hidden), hidden


def unrolled(criterion, model, x, y, steps=3):
    hidden = x[:, :3]
    for _ in range(steps):
        outputs, hidden = model(x, hidden)
    return criterion(outputs, y)


@pytest.mark.parametrize("how", ["hidden state", "features", "twice"])
def test_inputs_computed_from_parameters(how):
    def total(m, x, y):
        if how == "hidden state":
            return unrolled(CRITERION, m, x, y)
        if how == "features":
            return CRITERION(m[1](m[0](x)), y)
        return CRITERION(m(m(x)), y)

    def make():
        torch.manual_seed(0)
        kinds = {"hidden state": RecurrentCell, "features": lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))}
        return kinds.get(how, lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))().double()

    def with_derived_input(lab, whole):
        model = make()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, None if whole or how == "features" else CRITERION):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                if whole:
                    loss = lab.observe(total, x, y)
                elif how == "features":
                    loss = lab.observe(lambda m, hidden, y: CRITERION(m[1](hidden), y), model[0](x), y)
                else:
                    loss = total(model, x, y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: total(m, x, y))
                optimizer.step()
        lab.record_state(model)

    check_rows(functools.partial(with_derived_input, whole=True))
    with pytest.raises(LandscapeError, match=r"probe\.observe"):
        run(functools.partial(with_derived_input, whole=False), True, engine="loop")
    check_rows(functools.partial(with_derived_input, whole=False))


@pytest.mark.parametrize("how", ["outputs from outside", "an object around outputs"])
def test_loss_without_dependence(how):
    """All points of the ray would be equal to the training loss."""

    class Likelihood(nn.Module):
        def forward(self, distribution, targets):
            return -distribution.log_prob(targets).mean()

    def flat(lab):
        model, criterion = mlp().double(), Likelihood()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, criterion if "object" in how else None):
            for x, y in batches():
                optimizer.zero_grad()
                outputs = model(x)
                if "object" in how:
                    loss = criterion(torch.distributions.Categorical(logits=outputs), y)
                else:
                    loss = lab.observe(lambda m, outputs=outputs, y=y: CRITERION(outputs, y))
                loss.backward()
                optimizer.step()

    with pytest.raises(LandscapeError, match=r"0\.weight"):
        run(flat, True)


def test_target_network_moved_before_step():
    """The target is outside of the model; the loop skips updates at which it moves."""

    def learning(lab):
        model, target = mlp().double(), mlp().double().eval()
        target.requires_grad_(False)
        optimizer = sgd(model)
        with lab.attached(model, optimizer):
            for step, (x, _) in enumerate(batches(8)):
                lab.copy_modules(model, target)
                optimizer.zero_grad()
                loss = lab.observe(lambda m, x: F.mse_loss(m(x), 1 + 0.9 * target(x + 1)), x)
                loss.backward()
                lab.record_update(loss, lambda m, t, x=x: F.mse_loss(m(x), 1 + 0.9 * t(x + 1)))
                if step in (3, 6):
                    with torch.no_grad():
                        for parameter, source in zip(target.parameters(), model.parameters(), strict=True):
                            parameter.copy_(source)
                optimizer.step()
        lab.record_state(model, target)

    check_rows(learning, missing=[3, 6], engine="loop")
    check_rows(learning)


def test_accumulated_zero_gradient():
    """The zero gradient of a hinge loss is not mistaken for a cleared one."""

    def hinge(m, x, margin):
        return (margin - 100 + m(x).squeeze(1)).clamp(min=0).mean()

    def accumulating(lab):
        model = nn.Linear(6, 1).double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer):
            for x, _ in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                losses = []
                for margin in (0.0, 100.0):
                    losses.append(lab.observe(hinge, x, margin))
                    losses[-1].backward()
                lab.record_update(sum(losses), lambda m, x=x: hinge(m, x, 0.0) + hinge(m, x, 100.0))
                optimizer.step()
        lab.record_state(model)

    check_rows(accumulating)


def test_attach_with_gradients():
    model = mlp()
    optimizer = sgd(model)
    x, y = next(batches())
    CRITERION(model(x.float()), y).backward()
    with LandscapeProbe(model, optimizer, CRITERION, step_sizes=[0.1]):
        CRITERION(model(x.float()), y).backward()
        with pytest.raises(LandscapeError, match="zero_grad"):
            optimizer.step()


def test_first_batch_skipped():
    def throwing(lab):
        model = mlp().double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches()):
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                if step == 0:
                    optimizer.zero_grad()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model)

    check_rows(throwing, missing=[0], alone_missing=[0])


def test_kept_losses_hold_no_batch():
    model = mlp()
    optimizer = sgd(model)
    with LandscapeProbe(model, optimizer, CRITERION, step_sizes=[0.1], engine="loop"):
        total, held = torch.zeros(()), []
        for x, y in batches():
            optimizer.zero_grad()
            inputs = x.float()
            held.append(weakref.ref(inputs))
            loss = CRITERION(model(inputs), y)
            total = total + loss
            loss.backward()
            optimizer.step()
        del inputs, loss
        gc.collect()
        assert not any(one() is not None for one in held)
        assert total.isfinite()


def test_backward_patched_twice(monkeypatch):
    calls, original = [], torch.autograd.backward

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", counting)
    check_rows(trial, alone=False)
    assert len(calls) == 10
    assert torch.autograd.backward is counting


def test_backward_patched_between_two_probes(monkeypatch):
    """Another library's function lies between those of a probe that was never detached and of the next one."""
    model, optimizer = mlp().double(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = LandscapeProbe(model, optimizer, step_sizes=[0.1]).attach()
    calls, below, below_grad = [], torch.autograd.backward, torch.autograd.grad

    def counting(*args, **kwargs):
        calls.append(args)
        return below(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", counting)
    with LandscapeProbe(model, optimizer, step_sizes=[0.1]) as second:
        for x, y in batches():
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()
    first.detach()
    assert len(calls) == len(first.frame()) == len(second.frame()) == 4
    assert torch.autograd.backward is counting
    monkeypatch.undo()
    assert torch.autograd.grad is not below_grad
    with LandscapeProbe(model, optimizer, step_sizes=[0.1]):
        pass
    assert torch.autograd.backward is not below


def test_attention_evaluation_mode():
    """Without gradients torch would use its fast path."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(6, 3)

        def forward(self, x):
            tokens = x.reshape(4, 3, 6)
            padding = torch.tensor([[False, False, True]]).expand(4, 3)
            return self.head(self.encoder(tokens, src_key_padding_mask=padding)).flatten(0, 1)

    check_rows(functools.partial(trial, make=lambda: Padded().double().eval()))


def test_optimizer_of_another_model():
    model, other = mlp(), mlp()
    optimizer = sgd(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = LandscapeProbe(model, optimizer, CRITERION, step_sizes=[0.1])
    x, y = next(batches())
    with probe:
        CRITERION(model(x.float()) + 0 * other(x.float()), y).backward()
        with pytest.raises(LandscapeError):
            optimizer.step()


class Smoothing(nn.Module):
    """A criterion with an attribute, a buffer and noise."""

    def __init__(self, noise):
        super().__init__()
        self.alpha, self.noise = 0.0, noise
        self.register_buffer("weight", torch.ones(3, dtype=torch.float64))

    def forward(self, outputs, targets):
        noise = torch.randn_like(outputs) if self.noise else 0
        return F.cross_entropy(outputs + noise, targets, self.weight, label_smoothing=self.alpha)


CHANGES = {
    "attribute": lambda criterion, step: setattr(criterion, "alpha", 0.1 * step),
    "another buffer": lambda criterion, step: setattr(criterion, "weight", criterion.weight + step),
    "written buffer": lambda criterion, step: criterion.weight.add_(step),
    "numbers drawn": lambda criterion, step: torch.rand(1),
}


@pytest.mark.parametrize("when", ["before both", "between"])
@pytest.mark.parametrize("how", CHANGES)
def test_criterion_changed_by_the_loop(how, when):
    """A change before the model's call is in the snapshot; a later one is not."""

    def changing(lab):
        model, criterion = mlp().double(), Smoothing(noise=how == "numbers drawn")
        optimizer = sgd(model)
        with lab.attached(model, optimizer, criterion):
            for step, (x, y) in enumerate(batches()):
                if when == "before both":
                    CHANGES[how](criterion, step)
                lab.copy_modules(model, criterion)
                optimizer.zero_grad()
                outputs = model(x)
                if when == "between":
                    CHANGES[how](criterion, step)
                loss = criterion(outputs, y)
                loss.backward()
                lab.record_update(loss, lambda m, c, x=x, y=y: c(m(x), y))
                optimizer.step()
        lab.record_state(model, criterion)

    if when == "before both":
        check_rows(changing)
    else:
        with pytest.raises(LandscapeError, match=r"probe\.observe"):
            run(changing, True, engine="loop")
