"""Common optimizers: rays along the gradient that they get, and along the update that they make."""

import functools

import pytest
import torch
from lab import STEP_SIZES, batches, check_rows, check_same_training, mlp, run
from torch import nn

from landscape import LandscapeError, LandscapeProbe

CRITERION = nn.CrossEntropyLoss()


class Plain(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= 0.1 * parameter.grad


class Scribbling(torch.optim.SGD):
    """An optimizer that writes to gradients, as schedule-free optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(100).add_(1)


class Failing(torch.optim.SGD):
    """An optimizer that fails in its third step."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 3:
            raise MemoryError
        super().step()


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, by ``step(closure)`` or in two calls."""

    def __init__(self, parameters, rho=0.05):
        super().__init__(parameters, {"lr": 0.1, "rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=group["rho"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Wrapping(torch.optim.Optimizer):
    """A trainer's wrapper, which does not call ``Optimizer.__init__``."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "learning rate as tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "no learning rate": Plain,
    "writes to gradients": Scribbling,
    "wrapped": lambda p: Wrapping(torch.optim.SGD(p, lr=0.1)),
    "two groups": lambda p: (lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "lr": 0.01}], lr=0.1))(
        list(p)
    ),
}


def trial(lab, make, by_closure=False, **options):
    model = mlp().double()
    optimizer = make(model.parameters())
    with lab.attached(model, optimizer, CRITERION, **options):
        for x, y in batches():
            lab.copy_modules(model)
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            loss.backward()
            if options.get("direction") != "update":
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
            optimizer.step()
    lab.optimizer = optimizer
    lab.record_state(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_direction(name):
    check_rows(functools.partial(trial, make=OPTIMIZERS[name]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_direction(name):
    """Compare the norms of the gradient and of the update."""
    model = mlp().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    with LandscapeProbe(model, optimizer, CRITERION, step_sizes=[1.0], direction="update") as probe:
        for x, y in batches():
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            size = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
            before = [parameter.detach().clone() for parameter in model.parameters()]
            optimizer.step()
            moves = [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]
            row = probe.last()
            rate = 1.0 if row["lr"] != row["lr"] else row["lr"]
            assert row["grad_norm"] == pytest.approx(size, rel=1e-12)
            assert row["direction_norm"] * rate == pytest.approx(torch.nn.utils.get_total_norm(moves).item(), rel=1e-9)
    check_same_training(functools.partial(trial, make=OPTIMIZERS[name], direction="update"))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.LBFGS(p, 0.1, 3)], ids=["SGD", "LBFGS"]
)
def test_step_closure(make):
    def by_closure(lab):
        model = mlp().double()
        optimizer = make(model.parameters())
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                first = []

                def closure(x=x, y=y, first=first):
                    optimizer.zero_grad()
                    if not first:
                        lab.copy_modules(model)
                    loss = CRITERION(model(x), y)
                    loss.backward()
                    if not first:
                        lab.record_update(loss, lambda m: CRITERION(m(x), y))
                        first.append(loss)
                    return loss

                optimizer.step(closure)
        lab.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lab.record_state(model)

    check_rows(by_closure)


def test_failed_step():
    def trial(lab):
        model = mlp().double()
        optimizer = Failing(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches(6):
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                try:
                    optimizer.step()
                except MemoryError:
                    lab.result.losses.pop()
                    lab.result.references.pop()
        lab.record_state(model)

    torch.optim.SGD([torch.zeros(1)])  # Makes torch call hooks for the step of the base class, too.
    check_rows(trial)


def train_sam(lab, how):
    model = mlp().double()
    optimizer = SAM(model.parameters())
    given = optimizer.base_optimizer if how == "base" else optimizer
    with lab.attached(model, given, CRITERION):
        for x, y in batches():

            def closure(x=x, y=y):
                loss = CRITERION(model(x), y)
                loss.backward()
                return loss

            lab.copy_modules(model)
            if how == "closure alone":
                closure()
                optimizer.zero_grad()
            else:
                loss = closure()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
            if how in ("closure", "closure alone"):
                optimizer.step(closure)
            else:
                optimizer.first_step()
                closure()
                optimizer.second_step()
    lab.record_state(model)


def test_sam_closure():
    """The gradient at the start of the update was computed before the step."""
    torch.manual_seed(0)
    check_rows(functools.partial(train_sam, how="closure"))


def test_sam_two_calls():
    result = check_same_training(functools.partial(train_sam, how="two calls"))
    assert len(result.frame) == 0
    assert len(result.warnings) == 1


def test_sam_base_optimizer():
    with pytest.raises(LandscapeError, match="sharpness-aware"):
        run(functools.partial(train_sam, how="base"), True)


@pytest.mark.parametrize("first", [True, False])
def test_two_optimizers(first):
    """The loop can only probe the optimizer that steps first: the parameters are as in the forward pass."""

    def trial(lab):
        model = mlp().double()
        one = torch.optim.SGD(model[0].parameters(), lr=0.1)
        two = torch.optim.Adam([*model[1].parameters(), *model[3].parameters()], lr=0.01)
        given, other = (one, two) if first else (two, one)
        with lab.attached(model, given, CRITERION):
            for x, y in batches():
                lab.copy_modules(model)
                one.zero_grad()
                two.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                one.step()
                two.step()
        lab.optimizer = other
        lab.record_state(model)

    check_rows(trial)
    if not first:
        with pytest.raises(LandscapeError, match="Another optimizer"):
            run(trial, True, engine="loop")


def test_two_networks():
    """An actor and a critic have a loss, a backward pass and an optimizer each."""

    def trial(lab):
        model = nn.ModuleDict({"actor": mlp(), "critic": mlp()}).double()
        actor = torch.optim.SGD(model["actor"].parameters(), lr=0.1)
        critic = torch.optim.SGD(model["critic"].parameters(), lr=0.1)
        with lab.attached(model["actor"], actor, CRITERION):
            for x, y in batches():
                lab.copy_modules(model["actor"])
                actor.zero_grad()
                critic.zero_grad()
                loss = CRITERION(model["actor"](x), y)
                loss.backward()
                nn.functional.mse_loss(model["critic"](x), model["actor"](x).detach()).backward()
                critic.step()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                actor.step()
        lab.record_state(model)

    check_rows(trial)


def test_step_in_backward():
    def trial(lab):
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, CRITERION):
            model[0].weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
            x, y = next(batches())
            CRITERION(model(x), y).backward()

    with pytest.raises(LandscapeError, match="within the backward pass"):
        run(trial, True)


def test_relative_without_learning_rate():
    model = mlp()
    with pytest.raises(LandscapeError, match="relative=True"):
        LandscapeProbe(model, Plain(model.parameters()), CRITERION, step_sizes=STEP_SIZES, relative=True)


def test_optimizer_without_init():
    class Bare(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters), "lr": 0.1}]

    model = mlp()
    with pytest.raises(LandscapeError, match="Bare"):
        LandscapeProbe(model, Bare(model.parameters()), CRITERION, step_sizes=STEP_SIZES)


def test_complex_parameters():
    model = nn.Linear(2, 1, dtype=torch.complex128)
    with pytest.raises(LandscapeError, match="view_as_real"):
        LandscapeProbe(model, torch.optim.SGD(model.parameters()), step_sizes=STEP_SIZES)


@pytest.mark.parametrize("how", ["step", "method", "whole", "whole by observe"])
def test_compiled_step(how):
    torch.compiler.reset()

    def compiled(lab):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, None if "observe" in how else CRITERION):

            def step():
                optimizer.step()

            def whole(x, y):
                optimizer.zero_grad()
                if "observe" in how:
                    loss = lab.observe(lambda m, x, y: CRITERION(m(x), y), x, y)
                else:
                    loss = CRITERION(model(x), y)
                loss.backward()
                optimizer.step()
                return loss

            if how == "method":
                optimizer.step = torch.compile(optimizer.step, backend="eager")
            step, whole = (torch.compile(function, backend="eager") for function in (step, whole))
            for x, y in batches():
                if how.startswith("whole"):
                    lab.result.losses.append(whole(x, y).item())
                else:
                    optimizer.zero_grad()
                    loss = CRITERION(model(x), y)
                    loss.backward()
                    lab.result.losses.append(loss.item())
                    optimizer.step() if how == "method" else step()
        lab.record_state(model)

    result = check_same_training(compiled, engine="loop")
    assert list(result.frame["loss"]) == pytest.approx(result.losses, rel=1e-12)
    assert [row[0] for row in result.frame["losses"]] == pytest.approx(result.losses, rel=1e-9)
