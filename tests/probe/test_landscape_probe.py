import copy
import gc
import itertools
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from landscape import GhostNorm, LandscapeError, LandscapeProbe, ray_losses
from landscape.ray import evaluator
from landscape.ray.engines.registry import ENGINES
from landscape.ray.engines.tape import tape

STEP_SIZES = [0.05, 0.1, 0.2, 0.4]

NORMS = {"batch": lambda: nn.BatchNorm1d(12), "ghost": lambda: GhostNorm(12, groups=4)}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def make_model(norm="batch"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), NORMS[norm](), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(12, 3))


def batch():
    return torch.randn(16, 6), torch.randint(0, 3, (16,))


def train(model, optimizer, criterion, updates=5, accumulate=1, autocast=False, after=lambda: None):
    """Train as a user does."""
    torch.manual_seed(1)
    for _ in range(updates):
        optimizer.zero_grad()
        for _ in range(accumulate):
            inputs, targets = batch()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = criterion(model(inputs), targets) / accumulate
            loss.backward()
        optimizer.step()
        after()


def probed(norm="batch", optimizer="sgd", loop=None, **options):
    """Train a model with a probe, and return the probe."""
    model, criterion = make_model(norm), nn.CrossEntropyLoss()
    made = OPTIMIZERS[optimizer](model.parameters())
    with LandscapeProbe(model, made, criterion, **{"step_sizes": STEP_SIZES, "engine": "auto"} | options) as probe:
        train(model, made, criterion, **loop or {})
    return probe


@pytest.mark.parametrize("direction", ["gradient", "update"])
@pytest.mark.parametrize("loop", [{}, {"accumulate": 3}, {"autocast": True}], ids=["plain", "accumulation", "autocast"])
@pytest.mark.parametrize(("norm", "optimizer"), list(itertools.product(NORMS, OPTIMIZERS)))
def test_probe_changes_no_bit(norm, optimizer, loop, direction):
    def run(with_probe):
        model, criterion = make_model(norm), nn.CrossEntropyLoss()
        made = OPTIMIZERS[optimizer](model.parameters())
        probe = LandscapeProbe(model, made, criterion, step_sizes=STEP_SIZES, direction=direction)
        if with_probe:
            probe.attach()
        else:
            probe.detach()
        train(model, made, criterion, **loop)
        state = {
            **model.state_dict(),
            **{f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()},
            **{f"{i}.{key}": value for i, entry in made.state_dict()["state"].items() for key, value in entry.items()},
            "random": torch.rand(4),
        }
        return {key: value for key, value in state.items() if value is not None}, len(probe.frame())

    (with_probe, rows), (without, _) = run(True), run(False)
    assert rows == 5
    assert with_probe.keys() == without.keys()
    for key, tensor in without.items():
        assert torch.equal(tensor, with_probe[key]), key


def test_rows_against_ray_losses():
    """Compare each row with ``ray_losses`` of a copy of the model from before the forward pass."""
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    expected = []
    torch.manual_seed(1)
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
        for _ in range(3):
            inputs, targets = batch()
            before, state = copy.deepcopy(model), torch.get_rng_state()
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            with torch.random.fork_rng():
                torch.set_rng_state(state)
                closure = lambda model: criterion(model(inputs), targets)  # noqa: B023, E731
                expected.append(ray_losses(before, closure, gradient, [0.0, *STEP_SIZES], engine="loop"))
            optimizer.step()
    frame = probe.frame()
    for (_, row), losses in zip(frame.iterrows(), expected, strict=True):
        torch.testing.assert_close(torch.tensor([row.loss, *row.losses]), losses.double(), rtol=1e-6, atol=1e-6)
        assert (row.loss_min, row.loss_max) == (min(row.losses), max(row.losses))
        assert list(row.step_sizes) == STEP_SIZES
        assert row.lr == 0.1
    assert list(frame.step) == [0, 1, 2]


def test_accumulation_weights():
    model = nn.Linear(2, 1, bias=False).double()
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()
    inputs, targets = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 1, dtype=torch.float64)
    weights = [0.5, 0.3, 0.2]
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
        for x, y, weight in zip(inputs, targets, weights, strict=True):
            (weight * criterion(model(x), y)).backward()
        gradient = model.weight.grad.clone()
        start = model.weight.detach().clone()
        optimizer.step()
    row = probe.frame().iloc[0]
    expected = [
        sum(w * F.mse_loss(x @ (start - eta * gradient).T, y) for x, y, w in zip(inputs, targets, weights, strict=True))
        for eta in [0.0, *STEP_SIZES]
    ]
    torch.testing.assert_close(torch.tensor([row.loss, *row.losses]), torch.stack(expected), rtol=1e-12, atol=0)


def test_loss_changed_in_place():
    def losses(in_place):
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
            torch.manual_seed(1)
            inputs, targets = batch()
            loss = criterion(model(inputs), targets)
            loss = loss.mul_(1) if in_place else loss * 1
            loss.backward()
            optimizer.step()
        return probe.frame()[["loss", "loss_min", "loss_max"]]

    assert losses(True).equals(losses(False))


def test_update_direction():
    torch.manual_seed(0)
    model, inputs, targets = make_model().double().eval(), torch.randn(16, 6).double(), torch.arange(16) % 3
    optimizer, criterion = torch.optim.Adam(model.parameters(), lr=0.02), nn.CrossEntropyLoss()
    after = []
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[1.0, 0.5], relative=True, direction="update") as probe:
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
            after.append(criterion(model(inputs), targets).item())
    losses = [row[0] for row in probe.frame().losses]
    assert losses == pytest.approx(after, rel=1e-12)
    assert list(probe.frame().step_sizes[0]) == [0.02, 0.01]


def test_step_sizes():
    assert [list(s) for s in probed(step_sizes=[0.5, 2], relative=True).frame().step_sizes] == [[0.05, 0.2]] * 5
    growing = probed(step_sizes=lambda step: [0.1 * (k + 1) for k in range(step + 1)]).frame()
    assert [len(losses) for losses in growing.losses] == [1, 2, 3, 4, 5]


def test_every_and_epoch():
    frame = probed(every=2, steps_per_epoch=4).frame()
    assert list(frame.step) == [0, 2, 4]
    assert list(frame.epoch) == [0, 0.5, 1]


def test_step_closure():
    """The optimizer computes the gradient, once or several times in a step."""

    def run(make, with_closure):
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = make(model.parameters())
        torch.manual_seed(1)
        with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
            for _ in range(3):
                inputs, targets = batch()

                def closure():
                    optimizer.zero_grad()
                    loss = criterion(model(inputs), targets)  # noqa: B023
                    loss.backward()
                    return loss

                optimizer.step(closure) if with_closure else (closure(), optimizer.step())
        return probe.frame().drop(columns="seconds")

    sgd = OPTIMIZERS["sgd"]
    assert run(sgd, True).astype(str).equals(run(sgd, False).astype(str))
    assert len(run(lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3), True)) == 3


def test_evaluation_between_updates():
    def after():
        probe.model.eval()
        probe.criterion(probe.model(evaluation[0]), evaluation[1])
        with torch.no_grad():
            probe.criterion(probe.model(evaluation[0]), evaluation[1])
        probe.model.train()

    evaluation = batch()
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
        train(model, optimizer, criterion, after=after)
    assert probe.frame().losses.map(list).tolist() == probed().frame().losses.map(list).tolist()


def test_observe():
    def run(observe):
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        torch.manual_seed(1)
        with LandscapeProbe(
            model, optimizer, None if observe else criterion, step_sizes=STEP_SIZES, engine="auto"
        ) as probe:
            for _ in range(3):
                optimizer.zero_grad()
                for _ in range(2):
                    inputs, targets = batch()
                    if observe:
                        loss = probe.observe(lambda model, x, y: F.cross_entropy(model(x), y), inputs, targets)
                    else:
                        loss = criterion(model(inputs), targets)
                    loss.backward()
                optimizer.step()
        return probe.frame().losses.map(list).tolist()

    assert run(True) == run(False)


def test_observe_penalty():
    model = nn.Linear(2, 1).double()
    optimizer, inputs = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(4, 2).double()
    with LandscapeProbe(model, optimizer, step_sizes=[0.1]) as probe:
        probe.observe(lambda model: model(inputs).square().mean() + model.weight.square().sum()).backward()
        optimizer.step()
    after = model(inputs).square().mean() + model.weight.square().sum()
    assert probe.frame().losses[0][0] == pytest.approx(after.item(), rel=1e-12)


def test_loss_scaler_skipped_update():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto", grad_scaler=scaler) as probe:
        recorded = []
        for overflow in (False, True, False):
            optimizer.zero_grad()
            inputs, targets = batch()
            loss = criterion(model(inputs * float("inf") if overflow else inputs), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            recorded += [] if overflow else [loss.item()]
    assert probe.frame().loss.tolist() == pytest.approx(recorded)


def test_clipped_gradient():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
        criterion(*(lambda x, y: (model(x), y))(*batch())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert probe.frame().grad_norm[0] == pytest.approx(0.01, rel=1e-3)


def step_after(loss_of, criterion=None, **options):
    model = make_model()
    criterion = criterion or nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    probe = LandscapeProbe(model, optimizer, criterion, **{"step_sizes": STEP_SIZES, "engine": "auto"} | options)
    with probe:
        inputs, targets = batch()
        loss_of(model, criterion, inputs, targets).mean().backward()
        optimizer.step()
    return probe


REFUSED = {
    "penalty": (
        lambda m, c, x, y: c(m(x), y) + m[0].weight.square().sum(),
        r"depends on '0\.weight'",
    ),
    "computed from outputs": (lambda m, c, x, y: c(2 * m(x), y), "computed from the model's outputs"),
    "written outputs": (lambda m, c, x, y: c(m(x).mul_(2), y), "output of the model was changed in place"),
    "function": (lambda m, c, x, y: F.cross_entropy(m(x), y), "No loss was captured"),
    "without model": (lambda m, c, x, y: c(m[4](torch.zeros(16, 12)), y), "without a call of the model before it"),
}


@pytest.mark.parametrize(("loss_of", "message"), REFUSED.values(), ids=REFUSED)
def test_losses_that_the_loop_refuses(loss_of, message):
    with pytest.raises(LandscapeError, match=f"{message}.*probe.observe"):
        step_after(loss_of, engine="loop")
    losses = step_after(loss_of, engine="tape").frame().losses[0]
    assert len(losses) == len(STEP_SIZES)


def test_overwritten_batch():
    def reuse(model, criterion, inputs, targets):
        def overwrite(parameter):
            inputs.zero_()

        model[0].weight.register_post_accumulate_grad_hook(overwrite)
        return criterion(model(inputs), targets)

    with pytest.raises(LandscapeError, match=r"\(16, 6\) among the arguments of the model .*clone"):
        step_after(reuse)


def test_refused_update_after_first_row():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
        train(model, optimizer, criterion, updates=2)
        with pytest.warns(UserWarning, match="Step 2 is not in the trace: No loss was captured"):
            optimizer.step()
        train(model, optimizer, criterion, updates=1)
    assert list(probe.frame().step) == [0, 1, 3]


def test_error_after_first_row():
    calls = []

    def closure(model, inputs, targets):
        calls.append(inputs)
        if len(calls) > 30 and not torch.is_grad_enabled():
            raise MemoryError("out of memory")
        return F.cross_entropy(model(inputs), targets)

    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with (
        LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES, engine="loop") as probe,
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        for _ in range(6):
            optimizer.zero_grad()
            probe.observe(closure, *batch()).backward()
            optimizer.step()
    assert 0 < len(probe.frame()) < 6
    assert "is not in the trace: out of memory" in str(seen[-1].message)


def test_loss_not_repeatable():
    class Noisy(nn.Module):
        calls = 0

        def forward(self, outputs, targets):
            Noisy.calls += 1
            return F.cross_entropy(outputs, targets) + Noisy.calls

    with pytest.warns(UserWarning, match="At step size 0 the probe measures.*Likely causes"):
        step_after(lambda m, c, x, y: c(m(x), y), Noisy(), engine="loop")


def test_wrong_tape(monkeypatch):
    monkeypatch.setattr(evaluator, "tape", lambda ray: 1.1 * tape(ray))
    with pytest.warns(UserWarning, match="loop evaluates .*the tape cannot: it gives the losses"):
        probe = probed(engine="tape")
    assert probe.frame().losses.map(list).tolist() == probed(engine="loop").frame().losses.map(list).tolist()
    assert set(probe.frame().engine) == {"loop"}


def test_criterion_with_buffers_and_keywords():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, outputs, *, targets):
            self.seen += 1
            return F.cross_entropy(outputs, targets) * self.seen

    model, criterion = make_model(), Counting()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
        for _ in range(3):
            inputs, targets = batch()
            optimizer.zero_grad()
            criterion(model(inputs), targets=targets).backward()
            optimizer.step()
    assert criterion.seen == 3
    assert len(probe.frame()) == 3


class Momentum(nn.Module):
    """A checkpointed layer with a frozen copy that follows it in each forward pass, and a counter of calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.follower = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), nn.Linear(6, 3)
        self.follower.requires_grad_(False)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        with torch.no_grad():
            self.follower.weight.mul_(0.9).add_(self.layer[0].weight, alpha=0.1)
        return checkpoint(self.layer, inputs, use_reentrant=False) + self.follower(inputs) / self.calls


def test_written_frozen_parameters():
    def run(with_probe):
        torch.manual_seed(0)
        model, criterion = Momentum(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.layer.parameters(), lr=0.1)
        probe = LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="loop")
        if with_probe:
            probe.attach()
            with pytest.warns(UserWarning, match="Step 0 is not in the trace: The forward pass writes to frozen"):
                train(model, optimizer, criterion, updates=1)
        else:
            probe.detach()
            train(model, optimizer, criterion, updates=1)
        train(model, optimizer, criterion, updates=3)
        return model, probe.frame()

    (model, frame), (expected, _) = run(True), run(False)
    assert list(frame.step) == [1, 2, 3]
    assert model.calls == expected.calls == 4
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_flags_set_by_closure():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    inputs, targets = batch()
    model.eval()
    with LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES, engine="auto") as probe:
        probe.observe(lambda model: criterion(model.train()(inputs), targets)).backward()
        model.eval()
        optimizer.step()
    assert not any(module.training for module in model.modules())


def test_copied_model(tmp_path):
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with LandscapeProbe(model, optimizer, criterion, step_sizes=lambda step: STEP_SIZES, engine="auto") as probe:
        train(model, optimizer, criterion, updates=1)
        torch.save(model, tmp_path / "model.pt")
        for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            train(copied, OPTIMIZERS["sgd"](copied.parameters()), criterion, updates=1)
    assert len(probe.frame()) == 1


def test_two_probes():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    arguments = {
        "step_sizes": STEP_SIZES,
        "engine": "auto",
        "grad_scaler": torch.amp.GradScaler("cpu", enabled=False),
    }
    with (
        LandscapeProbe(model, optimizer, criterion, **arguments) as first,
        LandscapeProbe(model, optimizer, criterion, **arguments) as second,
    ):
        train(model, optimizer, criterion)
    assert first.frame().losses.map(list).tolist() == second.frame().losses.map(list).tolist()
    assert first.frame().losses.map(list).tolist() == probed().frame().losses.map(list).tolist()


def test_fused_optimizer_with_loss_scale():
    model, criterion = make_model().eval(), nn.CrossEntropyLoss()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1, fused=True), torch.amp.GradScaler("cpu")
    inputs, targets = batch()
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1], grad_scaler=scaler) as probe:
        scaler.scale(criterion(model(inputs), targets)).backward()
        scaler.step(optimizer)
    assert probe.frame().losses[0][0] == pytest.approx(criterion(model(inputs), targets).item(), rel=1e-5)


def test_outputs_in_object():
    class Holder:
        def __init__(self, logits):
            self.logits = logits

    class Model(nn.Linear):
        def forward(self, inputs):
            return Holder(super().forward(inputs))

    class Criterion(nn.Module):
        def forward(self, outputs, targets):
            return F.cross_entropy(outputs.logits, targets)

    torch.manual_seed(0)
    model, criterion = Model(6, 3), Criterion()
    optimizer, (inputs, targets) = torch.optim.SGD(model.parameters(), lr=0.1), batch()
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1]) as probe:
        criterion(model(inputs), targets).backward()
        optimizer.step()
    assert probe.frame().losses[0][0] == pytest.approx(criterion(model(inputs), targets).item(), rel=1e-5)


def test_first_check_of_zero_gradient():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="loop"):
        inputs, targets = batch()
        (criterion(model(inputs), targets) * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        (criterion(model(inputs), targets) + model[0].weight.square().sum()).backward()
        with pytest.warns(UserWarning, match=r"Step 1 is not in the trace.*0\.weight"):
            optimizer.step()


def test_losses_without_backward_freed():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held = []
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto"):
        for _ in range(5):
            inputs, targets = batch()
            held.append(weakref.ref(targets))
            criterion(model(inputs), targets)
        del inputs, targets
        gc.collect()
    assert not any(reference() is not None for reference in held)


def test_parameters_outside_of_optimizer():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1]) as probe:
        inputs, targets = batch()
        state = torch.get_rng_state()
        criterion(model(inputs), targets).backward()
        optimizer.step()
        torch.set_rng_state(state)
        with torch.no_grad():
            after = criterion(model(inputs), targets).item()
    assert probe.frame().losses[0][0] == pytest.approx(after, rel=1e-6)


def test_compiled_model():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with LandscapeProbe(compiled, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto") as probe:
        train(compiled, optimizer, criterion)
    losses, expected = (np.stack(each.frame().losses) for each in (probe, probed()))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def test_trace_and_facts(tmp_path):
    import landscape

    probe = probed(trace=tmp_path / "run", facts={"norm": "batch", "seed": 3})
    frame = landscape.read_traces(tmp_path)
    assert len(frame) == 5
    assert set(frame["norm"]) == {"batch"}
    assert set(frame["seed"]) == {3}
    assert set(frame["engine"]) < set(ENGINES)
    assert set(frame["direction"]) == {"gradient"}
    assert frame.losses.map(list).tolist() == probe.frame().losses.map(list).tolist()


def test_folder_after_refusal(tmp_path):
    with pytest.raises(LandscapeError, match="No loss was captured"):
        step_after(lambda m, c, x, y: F.cross_entropy(m(x), y), engine="loop", trace=tmp_path / "run")
    assert len(probed(trace=tmp_path / "run").frame()) == 5


def test_last_row():
    probe = probed()
    assert probe.last()["step"] == 4
    assert probe.last()["losses"] == list(probe.frame().losses.iloc[-1])
    model = make_model()
    assert LandscapeProbe(model, OPTIMIZERS["sgd"](model.parameters()), step_sizes=[1]).last() == {}


def test_detach():
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    probe = LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine="auto")
    with pytest.warns(UserWarning, match="not attached"):
        train(model, optimizer, criterion, updates=1)
    probe.attach().attach()
    train(model, optimizer, criterion, updates=2)
    probe.detach()
    train(model, optimizer, criterion, updates=1)
    assert len(probe.frame()) == 2
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not criterion._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_sizes": []}, "one finite number or more"),
        ({"every": 0}, "every=0"),
        ({"direction": "sideways"}, "direction='sideways'.*gradient, update"),
        ({"engine": "warp"}, "engine='warp': must be one of"),
        ({"criterion": F.cross_entropy}, "nn.Module.*omit criterion"),
    ],
)
def test_arguments_out_of_range(options, message):
    model = make_model()
    arguments = {"criterion": nn.CrossEntropyLoss(), "step_sizes": STEP_SIZES} | options
    with pytest.raises(LandscapeError, match=message):
        LandscapeProbe(model, OPTIMIZERS["sgd"](model.parameters()), **arguments)


CHANGED_GRADIENTS = {
    "unchanged": lambda parameters: None,
    "clipped by norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.01),
    "clipped by value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01),
    "replaced": lambda parameters: [setattr(p, "grad", p.grad.sign()) for p in parameters],
}


@pytest.mark.filterwarnings("ignore:The optimizer's gradient is not")
@pytest.mark.parametrize("direction", ["gradient", "update"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("how", CHANGED_GRADIENTS)
def test_changed_gradient_is_known_from_that_of_the_loss(how, gradients, direction):
    """The slope is of the loss; a part of the gradient may be of none."""
    model = make_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, slopes = [], []
    arguments: Any = {"step_sizes": [0.0, 1e-6], "gradients": gradients, "direction": direction}
    with LandscapeProbe(model, optimizer, **arguments) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            inputs, targets = batch()
            F.cross_entropy(model(inputs.double()), targets).backward()
            own = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
            CHANGED_GRADIENTS[how](list(model.parameters()))
            got = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
            cosine = min(1.0, F.cosine_similarity(own, got, dim=0).item())
            slopes.append((own @ got).item())
            expected.append((1 - cosine**2) ** 0.5)
            optimizer.step()
    frame = probe.frame()
    assert list(frame["gradient_rest"]) == pytest.approx(expected, abs=1e-6)
    assert list(frame["slope"]) == pytest.approx(slopes)
    falls = [(losses[0] - losses[1]) / 1e-6 for losses in frame["losses"]]
    assert falls == pytest.approx(slopes, rel=1e-3)
    assert (max(expected) > 0.1) == (how in ("clipped by value", "replaced"))
    if gradients:  # The gradient at step size 0 is the loss's, not the optimizer's.
        assert [row[0] for row in frame["gradient_distances"]] == pytest.approx([0.0] * 3, abs=1e-9)
        assert [row[0] for row in frame["gradient_cosines"]] == pytest.approx([1.0] * 3)


def test_gradient_changed_within_the_pass_is_unknown():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].weight.register_hook(lambda gradient: gradient.sign())
    with LandscapeProbe(model, optimizer, step_sizes=[0.1]) as probe:
        inputs, targets = batch()
        F.cross_entropy(model(inputs), targets).backward()
        with pytest.warns(UserWarning, match="slope is"), pytest.warns(UserWarning, match="gradient is not"):
            optimizer.step()
    assert probe.frame()["gradient_rest"].isna().all()


def test_slope_of_a_gradient_that_is_clipped_under_a_loss_scaler():
    model = make_model().double()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    expected = []
    with LandscapeProbe(model, optimizer, step_sizes=[0.1], grad_scaler=scaler) as probe:
        for step in range(6):
            optimizer.zero_grad()
            inputs, targets = batch()
            scaler.scale(F.cross_entropy(model(inputs.double()), targets)).backward()
            size = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() / 64
            if is_clipped := step >= 3:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            expected.append(0.01 * size if is_clipped else size**2)
            scaler.step(optimizer)
            scaler.update()
    expected[3] = np.nan  # no copy is kept of a gradient until one was changed
    assert list(probe.frame()["slope"]) == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_gradient_scaled_within_the_pass_is_warned_of():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 0.5 * gradient)
    with LandscapeProbe(model, optimizer, step_sizes=[0.1]):
        inputs, targets = batch()
        F.cross_entropy(model(inputs), targets).backward()
        with pytest.warns(UserWarning, match="0.5 times"):
            optimizer.step()


def test_foreach_writes_are_counted():
    """Under a dispatch mode torch does not count them."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LandscapeProbe(model, optimizer, step_sizes=[0.1]):
        tensor = torch.ones(3)
        torch._foreach_mul_([tensor], 2.0)
        assert tensor._version == 1


def test_repr_tells_how_far():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES, every=2)
    assert repr(probe) == "LandscapeProbe(step 0, 0 probed)"
    assert repr(probe.trace) == "TraceWriter(in memory, 0 updates)"
    with probe:
        train(model, optimizer, nn.CrossEntropyLoss(), updates=5)
    losses = probe.last()["losses"]
    expected = f"step 5, engine tape, 3 probed, last range {max(losses) - min(losses):.3g}"
    assert repr(probe) == f"LandscapeProbe({expected})"
    assert repr(probe.trace) == "TraceWriter(in memory, 3 updates)"
