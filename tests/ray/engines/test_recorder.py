"""The mode that records a step: it is left, keeps what replays need, and nothing else."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from lab import STEP_SIZES, batches, run
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode
from torch.utils.flop_counter import FlopCounterMode

from landscape import LandscapeError, LandscapeProbe
from landscape.ray.engines.recorder import PRUNED, Recorder


def stack():
    return _get_current_dispatch_mode_stack()


@pytest.fixture(autouse=True)
def _no_mode_is_left():
    yield
    left = list(stack())
    while stack():
        _pop_mode()
    assert not left


class Fails(nn.Module):
    """Model that fails in its forward pass, or in the backward pass, if told to."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.error = self.where = None

    def forward(self, x):
        out = self.layers(x)
        if self.where == "forward":
            raise self.error
        if self.where == "backward":
            out.register_hook(self._fail)
        return out

    def _fail(self, gradient):
        raise self.error


def attached(**options):
    torch.manual_seed(0)
    model = Fails().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"step_sizes": STEP_SIZES, "engine": "tape"} | options
    return model, optimizer, LandscapeProbe(model, optimizer, **options)


def update(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def expected_losses(rows=4):
    """Return the losses along the rays of an undisturbed training."""
    model, optimizer, probe = attached()
    with probe:
        for x, y in batches(rows):
            update(model, optimizer, x, y)
    return [list(losses) for losses in probe.frame()["losses"]]


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "a mode"])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_mode_is_left_by_error(kind, where):
    model, _, probe = attached()
    x, y = next(batches())
    model.error, model.where = kind("stop"), where
    with pytest.raises(kind, match="stop"), probe:  # noqa: PT012
        loss = F.cross_entropy(model(x), y)
        with FlopCounterMode(display=False) if where == "a mode" else nullcontext():
            if where in ("loss", "a mode"):
                raise model.error
        loss.backward()
    assert not stack()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_error_caught_by_the_loop(kind, where):
    model, optimizer, probe = attached()
    with probe:
        for x, y in batches():
            model.error, model.where = kind("stop"), where
            with pytest.raises(kind):
                update(model, optimizer, x, y)
            model.where = None
            update(model, optimizer, x, y)
    assert [list(losses) for losses in probe.frame()["losses"]] == expected_losses()


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Looking(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MODES = {
    "dispatch": Passing,
    "function": Looking,
    "flops": lambda: FlopCounterMode(display=False),
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("where", ["call", "backward", "update", "loop"])
@pytest.mark.parametrize("name", MODES)
def test_other_modes(name, where):
    """Rows are those without the mode."""
    entered = {
        place: MODES[name] if place == where else nullcontext for place in ("call", "backward", "update", "loop")
    }
    model, optimizer, probe = attached()
    with (
        probe,
        entered["loop"](),
    ):
        for x, y in batches():
            with entered["update"]():
                optimizer.zero_grad()
                with entered["call"]():
                    out = model(x)
                with entered["backward"]():
                    F.cross_entropy(out, y).backward()
                optimizer.step()
    rows, expected = [list(losses) for losses in probe.frame()["losses"]], expected_losses()
    assert rows == expected


def test_two_probes():
    """Each records the step of its own model, in which the other's is a constant."""
    model, optimizer, probe = attached()
    other, second, its_probe = attached()
    with probe, its_probe:
        for x, y in batches():
            update(model, optimizer, x, y)
            update(other, second, x, y)
    for each in (probe, its_probe):
        assert [list(losses) for losses in each.frame()["losses"]] == expected_losses()


def test_probes_left_in_any_order():
    probes = [attached()[2] for _ in range(3)]
    for probe in probes:
        probe.attach()
    for k in (1, 0, 2):
        probes[k].detach()
    assert not stack()


@pytest.mark.xfail(strict=True, reason="the mode is left in the thread that detaches only")
def test_mode_is_left_from_another_thread():
    probe = attached()[2].attach()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(probe.detach).result()
    assert not stack()


def test_other_threads_are_not_recorded():
    model, optimizer, probe = attached()
    counts, other = [], nn.Linear(6, 3).double()
    with probe:
        for x, y in batches():
            threads = [threading.Thread(target=lambda x=x: counts.append(len(stack())) or other(x).sum().backward())]
            threads[0].start()
            update(model, optimizer, x, y)
            threads[0].join()
    assert counts == [0] * 4
    assert [list(losses) for losses in probe.frame()["losses"]] == expected_losses()


class Threaded(Fails):
    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.layers, x).result()


def test_forward_pass_in_another_thread_is_refused():
    model = Threaded().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(LandscapeError, match=r"calls cannot be repeated.*observe"),
        LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES, engine="tape"),
    ):
        update(model, optimizer, *next(batches()))


def recorded(function, **parameters):
    """Return a recorder after a function of the parameters."""
    recorder = Recorder(parameters)
    with recorder.recording(), recorder.inside():
        result = function(**parameters)
    return recorder, result


WRITES = {
    "in place": lambda x: x.mul_(7),
    "a view": lambda x: x[0].fill_(7),
    "data": lambda x: x.data.add_(7),
    "out": lambda x: torch.add(x, 7, out=x),
    "foreach": lambda x: torch._foreach_mul_([x], 7.0),
    "numbers": lambda x: x.normal_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_constants_are_copied_before_writes(name):
    x = torch.arange(1.0, 5.0)
    before = x.clone()
    recorder, _ = recorded(lambda w: (w * x, WRITES[name](x)), w=torch.ones(4, requires_grad=True))
    (constant,) = recorder.calls[0].constants()
    assert torch.equal(constant.tensor, before)
    assert not torch.equal(x, before)


def test_unwritten_constants_are_not_copied():
    x = torch.ones(4)
    recorder, _ = recorded(lambda w: w * x, w=torch.ones(4, requires_grad=True))
    (constant,) = recorder.calls[0].constants()
    assert constant.tensor.data_ptr() == x.data_ptr()


INDEPENDENT = {
    "constants": lambda w: torch.ones(3).exp(),
    "another parameter": lambda w: nn.Linear(3, 3)(torch.ones(3)).sum(),
    "the shape": lambda w: (torch.zeros_like(w), w.new_ones(3), torch.rand_like(w) > 0.5),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_calls_are_not_recorded(name):
    recorder, _ = recorded(INDEPENDENT[name], w=torch.ones(4, requires_grad=True))
    assert not recorder.calls


def test_detached_tensors_are_constants_in_the_loop_alone():
    w = torch.ones(4, requires_grad=True)
    recorder = Recorder({"w": w})
    with recorder.recording():
        (w * 2).detach().exp()
        outside = len(recorder.calls)
        with recorder.inside():
            (w * 2).detach().exp()
    assert [str(call.func) for call in recorder.calls[:outside]].count("aten.exp.default") == 0
    assert [str(call.func) for call in recorder.calls[outside:]].count("aten.exp.default") == 1


@pytest.mark.parametrize("grad", [True, False])
def test_pruning_drops_freed_tensors(grad):
    kept = []

    def function(w):
        kept.append(w * 5)
        with torch.set_grad_enabled(grad):
            for _ in range(3 * PRUNED):
                (w.exp() * torch.ones(4)).sum()

    recorder, _ = recorded(function, w=torch.ones(4, requires_grad=True))
    assert len(recorder.calls) <= PRUNED + 10
    assert any(
        slot is recorder._table.memories[kept[0].untyped_storage()._cdata].base for slot in recorder.calls[0].makes()
    )


@pytest.mark.parametrize("read", ["nothing", "equal"])
def test_validation_holds_no_batches(read):
    """A long validation pass keeps the batches since the last pruning at most."""
    model, optimizer, probe = attached()
    refs = []
    with probe:
        update(model, optimizer, *next(batches()))
        with torch.no_grad():
            for _ in range(PRUNED):
                x = torch.ones(2, 6, dtype=torch.float64)
                refs.append(weakref.ref(x))
                out = model(x)
                if read == "equal":
                    torch.equal(out, torch.ones_like(out))
        del x, out
        assert sum(ref() is not None for ref in refs) <= PRUNED // 2


class Watched(torch.autograd.Function):
    """Identity, whose context lives as long as the graph."""

    contexts: ClassVar[list[weakref.ref]] = []

    @staticmethod
    def forward(ctx, x):
        Watched.contexts.append(weakref.ref(ctx))
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("options", [{}, {"direction": "update"}, {"gradients": True}], ids=str)
def test_step_frees_graph_and_batch(options, monkeypatch):
    monkeypatch.setattr(Watched, "contexts", alive := [])
    model, optimizer, probe = attached(**options)
    model.layers.insert(0, nn.Linear(6, 6).double())
    if not options.get("gradients"):  # a derivative of its own is refused
        model.layers.register_forward_hook(lambda module, args, out: Watched.apply(out))
    model.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(args[0])))
    with probe:
        for x, y in batches(3):
            update(model, optimizer, x.clone(), y)
            gc.collect()
            assert all(ref() is None for ref in alive)
    assert len(alive) == (3 if options.get("gradients") else 6)


def test_graph_is_not_kept_alive_by_constants(monkeypatch):
    """Another model's output is a constant of the tape; its graph is freed with it."""
    other = nn.Linear(4, 4)
    monkeypatch.setattr(Watched, "contexts", graphs := [])

    def function(w):
        out = Watched.apply(other(torch.ones(4)))
        return (w * out).sum().item()

    recorder, _ = recorded(function, w=torch.ones(4, requires_grad=True))
    gc.collect()
    assert recorder.calls
    assert graphs[0]() is None


def test_updates_that_are_not_due_are_not_recorded():
    model, optimizer, probe = attached(every=2)
    depths = []
    model.register_forward_hook(lambda module, args, out: depths.append(len(stack())))
    with probe:
        for x, y in batches():
            update(model, optimizer, x, y)
    assert depths == [1, 0, 1, 0]


def test_lazy_parameters():
    def trial(lab):
        model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer):
            for x, y in batches():
                update(model, optimizer, x, y)

    assert list(run(trial, True, alone=True).frame["step"]) in ([1, 2, 3], [0, 1, 2, 3])


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("part", ["model", "loss"])
def test_compiled_parts_are_refused(part):
    """Their calls are not those of the dispatcher."""
    torch._dynamo.reset()  # Code that was compiled too often runs as it is.
    torch.manual_seed(0)
    model, loss = nn.Linear(6, 3).double(), F.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = torch.compile(model, backend="aot_eager") if part == "model" else model
    loss = torch.compile(loss, backend="aot_eager") if part == "loss" else loss
    x, y = next(batches())
    with LandscapeProbe(model, optimizer, step_sizes=[0.1]):
        loss(called(x), y).backward()
        with pytest.raises(LandscapeError, match="compiled"):
            optimizer.step()


def test_mode_is_freed_with_a_probe_that_was_not_detached():
    model = nn.Linear(6, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = LandscapeProbe(model, optimizer, step_sizes=[0.1]).attach()
    assert len(_get_current_dispatch_mode_stack()) == 1
    del model, optimizer, probe
    gc.collect()
    assert not _get_current_dispatch_mode_stack()
