"""Situations of real trainings: schedules, checkpoints, sparse gradients, caught errors, layers that join later."""

import copy
import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from lab import batches, check_rows, mlp, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from landscape import LandscapeProbe, UserError

CRITERION = nn.CrossEntropyLoss()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def trial(lab, make=lambda: mlp().double(), optimize=sgd, begin=None, after=None, total=None, updates=5, **options):
    """A plain loop; ``begin`` is called before each update, ``after`` between its backward pass and its step."""
    model = make()
    optimizer = optimize(model)
    total = total or (lambda m, x, y: CRITERION(m(x), y))
    with lab.attached(model, optimizer, CRITERION, **options):
        for step, (x, y) in enumerate(batches(updates)):
            if begin:
                begin(step, model, optimizer)
            lab.before(model)
            optimizer.zero_grad()
            loss = total(model, x, y)
            loss.backward()
            if after:
                after(model, x, y)
            lab.update(loss, lambda m, x=x, y=y: total(m, x, y))
            optimizer.step()
    lab.left(model)


class Checkpointed(nn.Module):
    """Computes a layer with dropout again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant else x
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class Words(nn.Module):
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


SITUATIONS = {
    "checkpoints": {"make": lambda: Checkpointed(False).double()},
    "reentrant checkpoints": {"make": lambda: Checkpointed(True).double()},
    "sparse gradients": {"make": lambda: Words().double()},
    "cumulative averages": {"make": lambda: nn.Sequential(nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3)).double()},
    "a norm in evaluation mode": {"make": norm_in_evaluation},
    "frozen later": {"begin": freeze},
    "trained later": {"optimize": lambda model: torch.optim.SGD(model[3].parameters(), lr=0.1), "begin": join},
    "states that are loaded": {"begin": load},
    "copies": {"begin": copied},
    "evaluation between": {"after": evaluate},
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_situations(name):
    check_rows(functools.partial(trial, **SITUATIONS[name]))


def test_gradients_along_the_ray_are_refused_under_reentrant_checkpoints():
    with pytest.raises(UserError, match="use_reentrant=False"):
        run(functools.partial(trial, make=lambda: Checkpointed(True).double(), gradients=True), True)


def test_a_schedule_of_the_learning_rate():
    def scheduled(lab):
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=8)
        rates = []
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches(6):
                lab.before(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
        lab.left(model)
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


def test_a_hidden_state_that_is_carried_on():
    def truncated(lab):
        model, criterion, hidden = Recurrent().double(), FirstOutput(), None
        optimizer = sgd(model)
        with lab.attached(model, optimizer, criterion):
            for x, y in batches():
                lab.before(model)
                optimizer.zero_grad()
                outputs = model(x, hidden)
                loss = criterion(outputs, y)
                loss.backward()
                lab.update(loss, lambda m, x=x, y=y, hidden=hidden: criterion(m(x, hidden), y))
                hidden = outputs[1].detach()
                optimizer.step()
        lab.left(model)

    check_rows(truncated)


def test_errors_that_the_loop_catches():
    """In the forward pass of one update and in the backward pass of another."""

    def catching(lab):
        model = mlp().double()
        optimizer = sgd(model)

        def fail(gradient):
            raise ZeroDivisionError

        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches(8)):
                lab.before(model)
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
                lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.left(model)

    check_rows(catching)


def test_a_probe_that_is_detached_for_a_while():
    def pausing(lab):
        model = mlp().double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, CRITERION):
            for step, (x, y) in enumerate(batches(8)):
                if lab.probe and step == 3:
                    lab.probe.detach()
                if lab.probe and step == 5:
                    lab.probe.attach()
                lab.before(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                if step not in (3, 4):
                    lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.left(model)

    check_rows(pausing)


def test_a_critic_with_a_gradient_penalty_and_clipped_weights():
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
                lab.before(model)
                optimizer.zero_grad()
                loss = lab.observe(total, real, false)
                loss.backward()
                lab.update(loss, lambda m, real=real, false=false: total(m, real, false))
                optimizer.step()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.clamp_(-0.5, 0.5)
        lab.left(model)

    check_rows(critic)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_graphs_that_are_kept_or_made():
    """A loss is differentiated, forgotten, and differentiated again, with a graph of the gradient."""

    def keeping(lab):
        model = mlp().double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.before(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward(retain_graph=True)
                optimizer.zero_grad()
                loss.backward(create_graph=True)
                lab.update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
            optimizer.zero_grad()
        lab.left(model)

    check_rows(keeping)


def test_gradients_that_the_loop_puts_in_place_itself_are_refused():
    """Nothing tells them from those of an attack."""

    def by_hand(lab):
        model = mlp().double()
        optimizer = sgd(model)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                gradients = torch.autograd.grad(CRITERION(model(x), y), list(model.parameters()))
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()

    with pytest.raises(UserError, match=r"loss\.backward"):
        run(by_hand, True)


def test_trainings_in_threads_leave_each_other_alone():
    def train(results, number, probed):
        torch.manual_seed(number)
        model, criterion = results[number]["model"], nn.CrossEntropyLoss()
        optimizer, losses = sgd(model), []
        probe = LandscapeProbe(model, optimizer, criterion, step_sizes=[0.0, 0.1], engine="loop")
        if probed:
            probe.attach()
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
