"""Modules outside of the model, and tensors that the user keeps: rays change neither."""

import copy
import functools
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from lab import ENGINES, STEP_SIZES, batches, check_rows, check_same_training, mlp, run
from torch import nn

from landscape import LandscapeError, LandscapeProbe, ray_losses
from landscape.ray import evaluator
from landscape.ray.engines.loop import loop

CRITERION = nn.CrossEntropyLoss()
SPECTRAL = nn.utils.parametrizations.spectral_norm


class Counting(nn.Module):
    """A module that counts its calls in an attribute, and averages its inputs in a parameter."""

    def __init__(self):
        super().__init__()
        self.calls, self.mean = 0, nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean / self.calls


FOREIGN_MODULES = {
    "plain": lambda: nn.Linear(3, 3),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "spectral norm": lambda: nn.Sequential(SPECTRAL(nn.Linear(3, 4)), nn.LeakyReLU(), SPECTRAL(nn.Linear(4, 3))),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)),
    "writes": Counting,
    "teacher": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(),
}
CHANGING = {"BatchNorm", "spectral norm", "writes"}


def adversarial(lab, name):
    """Probe a generator whose discriminator is trained, too, and has a state."""
    model, other = mlp().double(), FOREIGN_MODULES[name]().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
    second = torch.optim.SGD(trained or [torch.zeros(1)], lr=0.1)
    with lab.attached(model, optimizer):
        for x, y in batches(5):
            second.zero_grad()
            CRITERION(other(model(x).detach()), y).backward() if trained else None
            second.step()
            lab.copy_modules(model, other)
            optimizer.zero_grad()
            loss = lab.observe(lambda m, x, y: CRITERION(other(m(x)), y), x, y)
            loss.backward()
            lab.record_update(loss, lambda m, o, x=x, y=y: CRITERION(o(m(x)), y))
            optimizer.step()
    lab.record_state(model, other)
    lab.result.objects["calls"] = getattr(other, "calls", None)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FOREIGN_MODULES)
def test_observe_foreign_module(name, engine):
    missing = [0] if engine == "loop" and name in CHANGING else []
    check_rows(functools.partial(adversarial, name=name), missing, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FOREIGN_MODULES)
def test_ray_losses_foreign_module(name, engine):
    torch.manual_seed(0)
    model, other = mlp().double(), FOREIGN_MODULES[name]().double()
    x, y = next(batches())
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    moved, beside, rng_state = copy.deepcopy(model), copy.deepcopy(other), torch.get_rng_state()
    got = ray_losses(model, lambda m: CRITERION(other(m(x)), y), direction, [0.0, 0.1, 0.0], engine=engine)
    assert torch.equal(rng_state, torch.get_rng_state())
    for one, two in ((model, moved), (other, beside)):
        for (name, tensor), expected in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.equal(tensor, expected), name
    expected = CRITERION(beside(moved(x)), y).item()
    assert [got[0].item(), got[2].item()] == pytest.approx([expected] * 2, rel=1e-9)


class Hiding(nn.Module):
    """A model with a teacher in a list, so that its parameters have no name."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.teacher = [nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))]

    def forward(self, x):
        return self.net(x) + self.teacher[0](x)


def test_module_hidden_in_list():
    def trial(lab):
        model = Hiding().double()
        model.teacher[0].double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = CRITERION(model(x), y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
        lab.record_state(model, model.teacher[0])

    check_rows(trial, missing=[0], engine="loop")


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_made_in_the_loss(engine):
    def trial(lab):
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def closure(m, x, y):
            return nn.CrossEntropyLoss()(nn.BatchNorm1d(3).double()(m(x)), y)

        with lab.attached(model, optimizer):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = lab.observe(closure, x, y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: closure(m, x, y))
                optimizer.step()
        lab.record_state(model)

    check_rows(trial, engine=engine)


KEEPERS = {
    "hook": lambda model, kept: model[2].register_forward_hook(lambda module, args, out: kept.append(out.detach())),
    "pre-hook": lambda model, kept: model[2].register_forward_pre_hook(
        lambda module, args: kept.append(args[0].detach())
    ),
    "hook of the last": lambda model, kept: model.register_forward_hook(lambda module, args, out: kept.append(out)),
    "module": lambda model, kept: setattr(model[2], "forward", lambda x: (kept.append(x.detach()), F.relu(x))[1]),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*KEEPERS, "observed loss", "criterion"])
def test_kept_tensors(name, engine, late):
    """Tensors of a batched evaluation cannot be used outside of it, so the user must get none."""
    kept = []

    class Keeping(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            kept.append(outputs.detach())
            return super().forward(outputs, targets)

    model, criterion = mlp(), Keeping() if name == "criterion" else CRITERION
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keeper = KEEPERS.get(name, lambda model, kept: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LandscapeProbe(
            model, optimizer, None if name == "observed loss" else criterion, step_sizes=STEP_SIZES, engine=engine
        ) as probe:
            for step, (x, y) in enumerate(batches(7)):
                if name in KEEPERS and step == (5 if late and name != "module" else 0):
                    keeper(model, kept)
                optimizer.zero_grad()
                if name == "observed loss":

                    def closure(m, x, y):
                        kept.append(criterion(m(x), y).detach())
                        return criterion(m(x), y)

                    loss = probe.observe(closure, x.float(), y)
                else:
                    loss = criterion(model(x.float()), y)
                loss.backward()
                optimizer.step()
                sum(tensor.sum() for tensor in kept)
    assert kept
    assert len(probe.frame()) == 7
    assert all("Step" not in str(warning.message) for warning in caught)
    for tensor in kept:
        assert (tensor > 0).float().mean().item() >= 0


def test_no_graph_kept():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LandscapeProbe(model, optimizer, CRITERION, step_sizes=STEP_SIZES, engine="loop"):
        for x, y in batches():
            optimizer.zero_grad()
            outputs = model(x.float())
            loss = CRITERION(outputs, y)
            loss.backward()
            optimizer.step()
        held = [weakref.ref(outputs), weakref.ref(loss)]
        del loss, outputs
        gc.collect()
        assert not any(one() is not None for one in held)


def train_by_functorch(lab):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lab.attached(model, optimizer, CRITERION):
        for x, y in batches():
            parameters = {name: p.detach() for name, p in model.named_parameters()}

            def loss_of(parameters, x=x, y=y):
                return CRITERION(torch.func.functional_call(model, parameters, (x.float(),)), y)

            for name, gradient in torch.func.grad(loss_of)(parameters).items():
                dict(model.named_parameters())[name].grad = gradient
            optimizer.step()
    lab.record_state(model)


def test_functorch_loop():
    with pytest.raises(LandscapeError, match=r"torch\.func"):
        run(train_by_functorch, True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["whole", "part"])
def test_scripted_model(how):
    scripted = torch.jit.script(nn.Linear(6, 3))
    model = scripted if how == "whole" else nn.Sequential(scripted, nn.Linear(3, 3))
    with pytest.raises(LandscapeError, match="scripted"):
        LandscapeProbe(model, torch.optim.SGD(model.parameters(), lr=0.1), CRITERION, step_sizes=STEP_SIZES)
    with pytest.raises(LandscapeError, match="scripted"):
        ray_losses(model, lambda m: m(torch.ones(2, 6)).sum(), {}, STEP_SIZES)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("remedy", [False, True])
def test_overwritten_batch(observed, remedy):
    def trial(lab):
        model, buffer = mlp().double(), torch.empty(12, 6, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, None if observed else CRITERION):
            for x, y in batches():
                buffer.copy_(x)
                lab.copy_modules(model)
                optimizer.zero_grad()
                given = buffer.clone() if remedy else buffer
                if observed:
                    loss = lab.observe(lambda m, x, y: CRITERION(m(x), y), given, y)
                else:
                    loss = CRITERION(model(given), y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                buffer.zero_()
                optimizer.step()
        lab.record_state(model)

    check_rows(trial)
    if not remedy:
        with pytest.raises(LandscapeError, match=r"\(12, 6\).*clone"):
            run(trial, True, engine="loop")


@pytest.mark.parametrize("modes", ["oo", "oc", "co", "cc"])
def test_two_probes(modes):
    """Two probes have the same rows, with a criterion or by `observe`."""

    def trial(lab):
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first, second = (None if mode == "o" else CRITERION for mode in modes)
        other = None
        with lab.attached(model, optimizer, first):
            if lab.probed:
                other = LandscapeProbe(model, optimizer, second, step_sizes=STEP_SIZES).attach()

            def inner(m, x, y):
                if other is not None and modes[1] == "o":
                    return other.observe(lambda m, x, y: CRITERION(m(x), y), x, y)
                return CRITERION(m(x), y)

            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = lab.observe(inner, x, y) if modes[0] == "o" else inner(model, x, y)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: CRITERION(m(x), y))
                optimizer.step()
            if other is not None:
                other.detach()
                assert list(other.frame()["step"]) == [0, 1, 2, 3]
                for row, expected in zip(other.frame()["losses"], lab.result.references, strict=True):
                    assert list(row) == pytest.approx(expected, rel=1e-9)
        lab.record_state(model)

    check_rows(trial)


@pytest.mark.parametrize("trace", [False, True])
def test_state_after_detach(trace, tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    place = tmp_path / "run" if trace else None
    with LandscapeProbe(model, optimizer, CRITERION, step_sizes=STEP_SIZES, trace=place) as probe:
        for x, y in batches():
            optimizer.zero_grad()
            CRITERION(model(x.float()), y).backward()
            optimizer.step()
    assert probe.state_dict()["step"] == 4
    with probe:
        x, y = next(batches())
        CRITERION(model(x.float()), y)
    assert probe.state_dict()["step"] == 4


def test_model_contents_restored(monkeypatch):
    """A safety net under the engines."""

    rays = []

    def careless(ray):
        rays.append(ray)
        if len(rays) < 3:  # The checks of the first updates come after their rays.
            return loop(ray)
        model = ray.objective.loss_module.model
        losses = loop(ray)
        model[0]._parameters["weight"] = model[0].weight.detach()
        model[1]._buffers["running_mean"] = model[1].running_mean.clone()
        del model._modules["3"]
        return losses

    monkeypatch.setattr(evaluator, "loop", careless)

    def trial(lab):
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, CRITERION):
            for x, y in batches():
                optimizer.zero_grad()
                CRITERION(model(x), y).backward()
                optimizer.step()
        lab.record_state(model)

    result = check_same_training(trial, engine="loop")
    assert any("restored" in message for message in result.warnings)
