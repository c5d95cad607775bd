"""Updates that several optimizers make together, as Muon and AdamW do."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from landscape import GhostNorm, LandscapeError, LandscapeProbe

STEP_SIZES = [0.05, 0.1, 0.2]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), GhostNorm(12, groups=4), nn.ReLU(), nn.Linear(12, 3)).double()


def split(model):
    """Return two lists of parameters that interleave in the model."""
    parameters = list(model.parameters())
    return parameters[::2], parameters[1::2]


def train(model, optimizers, probe=None, steps=None, updates=4, scaler=None, between=lambda: None):
    """Train with steps in the given order; return the parameters."""
    torch.manual_seed(1)
    with probe or LandscapeProbe(model, optimizers, step_sizes=STEP_SIZES):
        for update in range(updates):
            inputs, targets = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            (loss if scaler is None else scaler.scale(loss)).backward()
            for place, optimizer in enumerate(optimizers if steps is None else steps(update)):
                if place:
                    between()
                optimizer.step() if scaler is None else scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
    return [parameter.detach().clone() for parameter in model.parameters()]


def frame_of(optimizers_of, **given):
    """Return the rows of a training, and its last parameters."""
    names = ("direction", "relative", "every", "step_sizes")
    options = {name: given.pop(name) for name in names if name in given}
    model = make_model()
    optimizers = optimizers_of(model)
    steps = given.pop("steps", None)
    probe = LandscapeProbe(model, optimizers, **{"step_sizes": STEP_SIZES} | options)
    chosen = None if steps is None else lambda update: [optimizers[place] for place in steps(update)]
    parameters = train(model, optimizers, probe, chosen, **given)
    return probe.frame(), parameters


def assert_same_rows(one, other):
    assert len(one) == len(other) > 0
    for name in ("step", "loss", "lr", "grad_norm", "direction_norm", "slope", "loss_min", "loss_max"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12, err_msg=name)
    np.testing.assert_allclose([*one.losses], [*other.losses], rtol=1e-12)


def two_sgd(model, **options):
    first, second = split(model)
    return [torch.optim.SGD(first, lr=0.1, **options), torch.optim.SGD(second, lr=0.1, **options)]


def one_sgd(model, **options):
    return [torch.optim.SGD(model.parameters(), lr=0.1, **options)]


@pytest.mark.parametrize("direction", ["gradient", "update"])
@pytest.mark.parametrize(
    "steps", [lambda update: [0, 1], lambda update: [1, 0], lambda update: [update % 2, 1 - update % 2]]
)
def test_two_optimizers_are_one_that_holds_all(direction, steps):
    frame, parameters = frame_of(two_sgd, direction=direction, steps=steps)
    expected, same = frame_of(one_sgd, direction=direction)
    assert_same_rows(frame, expected)
    assert all(map(torch.equal, parameters, same))


def test_each_parameter_moves_by_the_rate_of_its_optimizer():
    def two(model):
        first, second = split(model)
        return [torch.optim.SGD(first, lr=0.1), torch.optim.SGD(second, lr=0.3)]

    def groups(model):
        first, second = split(model)
        return [torch.optim.SGD([{"params": first}, {"params": second, "lr": 0.3}], lr=0.1)]

    options = {"step_sizes": [0.5, 1.0], "relative": True}
    assert_same_rows(frame_of(two, **options)[0], frame_of(groups, **options)[0])


def muon_and_adamw(model):
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_adamw():
    """A step size equal to the learning rate is the update that both make."""
    model = make_model()
    optimizers = muon_and_adamw(model)
    probe = LandscapeProbe(model, optimizers, step_sizes=[0.02], direction="update")
    train(model, optimizers, probe)
    frame = probe.frame()
    assert frame.optimizer.unique().tolist() == ["Muon + AdamW"]
    torch.manual_seed(1)
    *_, (x, y) = [(torch.randn(16, 6).double(), torch.randint(0, 3, (16,))) for _ in range(4)]
    after = nn.functional.cross_entropy(model(x), y).item()
    assert [losses[0] for losses in frame.losses][-1] == pytest.approx(after, rel=1e-12)


def test_loss_scaler_divides_the_gradients_of_each_optimizer():
    """At the first step, gradients of the other optimizers are still scaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    frame, parameters = frame_of(two_sgd, scaler=scaler)
    expected, same = frame_of(two_sgd)
    assert_same_rows(frame, expected)
    for one, other in zip(parameters, same, strict=True):
        torch.testing.assert_close(one, other)


def test_optimizer_that_makes_no_step():
    """Updates 1 and 2 are not along the gradients of both."""
    with pytest.warns(UserWarning, match="SGD") as found:
        frame, parameters = frame_of(two_sgd, steps=lambda update: [0] if update in (1, 2) else [0, 1], updates=5)
    assert frame.step.tolist() == [0, 3, 4]
    assert len(found) == 2
    with pytest.warns(UserWarning, match="SGD"):
        _, same = frame_of(two_sgd, steps=lambda update: [0] if update in (1, 2) else [0, 1], updates=5, every=2)
    assert all(map(torch.equal, parameters, same))


def test_gradient_changed_between_the_steps():
    model = make_model()
    optimizers = two_sgd(model)
    probe = LandscapeProbe(model, optimizers, step_sizes=STEP_SIZES)

    def clip():
        nn.utils.clip_grad_norm_(split(model)[1], 1e-3)

    with pytest.warns(UserWarning, match="SGD") as found:
        train(model, optimizers, probe, between=clip, updates=2)
    assert len(probe.frame()) == 0
    assert len(found) == 2


def test_closure_of_the_first_optimizer():
    model, plain = make_model(), make_model()

    def run(model, optimizers):
        torch.manual_seed(1)
        with LandscapeProbe(model, optimizers, step_sizes=STEP_SIZES) as probe:
            for _ in range(3):
                inputs, targets = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))

                def closure(inputs=inputs, targets=targets):
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                    loss.backward()
                    return loss

                first, *others = optimizers
                first.step(closure)
                for optimizer in others:
                    optimizer.step()
        return probe.frame()

    assert_same_rows(run(model, two_sgd(model)), run(plain, one_sgd(plain)))


def differentiate(model, optimizers):
    """Compute the gradient of a batch."""
    x, y = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
    for optimizer in optimizers:
        optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


class FailsOnce(torch.optim.SGD):
    """An optimizer whose first step fails."""

    failed = False

    @torch.no_grad()
    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise RuntimeError("no memory")
        return super().step(closure)


def test_failed_step_is_no_step():
    model = make_model()
    first, second = split(model)
    optimizers = [torch.optim.SGD(first, lr=0.1), FailsOnce(second, lr=0.1)]
    with LandscapeProbe(model, optimizers, step_sizes=STEP_SIZES) as probe:
        for attempt in range(2):
            differentiate(model, optimizers)
            optimizers[0].step()
            if attempt == 0:
                with pytest.raises(RuntimeError, match="memory"):
                    optimizers[1].step()
            optimizers[1].step()
    assert probe.step == 2
    assert probe.frame().step.tolist() == [0, 1]


@pytest.mark.parametrize("given", ["none", "twice", "no optimizer", "shared parameters"])
def test_errors(given):
    model = make_model()
    lists = {"none": [], "twice": one_sgd(model) * 2, "no optimizer": [None]}
    lists["shared parameters"] = [*one_sgd(model), *two_sgd(model)]
    with pytest.raises(LandscapeError, match="optimizer"):
        LandscapeProbe(model, lists[given])


def test_wrappers_in_a_list():
    """Trainers wrap each optimizer."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = make_model()
    optimizers = two_sgd(model)
    assert LandscapeProbe(model, [Wrapper(one) for one in optimizers]).optimizers == tuple(optimizers)


@pytest.mark.parametrize("how", ["state_dict", "detach"])
def test_update_without_one_step_ends(how):
    """Before a checkpoint, and at the end, an update in which one optimizer made no step is over."""
    model = make_model()
    optimizers = two_sgd(model)
    probe = LandscapeProbe(model, optimizers, step_sizes=STEP_SIZES).attach()
    x, y = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizers[0].step()
    with pytest.warns(UserWarning, match="SGD"):
        getattr(probe, how)()
    assert probe.step == 1
    assert len(probe.frame()) == 0
    probe.detach()


def test_failed_step_that_is_not_repeated_loses_its_own_row_only():
    model = make_model()
    first, second = split(model)
    optimizers = [torch.optim.SGD(first, lr=0.1), FailsOnce(second, lr=0.1)]
    probe = LandscapeProbe(model, optimizers, step_sizes=STEP_SIZES)

    def run():
        with probe:
            for _ in range(3):
                differentiate(model, optimizers)
                optimizers[0].step()
                with contextlib.suppress(RuntimeError):
                    optimizers[1].step()

    with pytest.warns(UserWarning, match="Fails"):
        run()
    assert probe.frame().step.tolist() == [1, 2]
