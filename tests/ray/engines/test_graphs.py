"""Programs of replays, run again as they are instead of captured: all but the capture."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape import LandscapeProbe, make_norm
from landscape.ray.engines import graphs
from landscape.ray.engines.graphs import Graphs
from landscape.ray.engines.recorder import Recorder
from landscape.ray.engines.tape import tape as evaluate
from landscape.ray.loss_module import LossModule
from landscape.ray.ray import Ray

STEP_SIZES = (0.3, -0.1, 0.05)


def network(norm="batch", width=12):
    torch.manual_seed(0)
    options = {"groups": 4} if norm == "ghost" else {}
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        make_norm(norm, **options)(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 5),
    ).double()


def step(model, samples=16, seed=0, loss=F.cross_entropy):
    """Return the tape of an update and its ray."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 4, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(5, (samples,), generator=generator)
    recorder = Recorder(dict(model.named_parameters()))
    with recorder.recording():
        value = loss(model(x), y)
    root = recorder.add_root([value], [None])
    tape = recorder.tape([root], LossModule(model), value.detach())
    gradient = torch.autograd.grad(value, [*model.parameters()])
    direction = dict(zip(dict(model.named_parameters()), gradient, strict=True))
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return tape, Ray(tape, origin, direction, STEP_SIZES)


@torch.no_grad()
def losses(programs, tape, ray):
    """Return the losses by a program, or None, and those of the tape."""
    with tape.rng_restored():
        found = programs.losses(tape, ray)
    return found, evaluate(ray)


def move(model, ray):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(ray.direction[name], alpha=0.1)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})


@pytest.fixture
def captures():
    """List of captured functions, and programs that run them."""
    made = []
    return made, Graphs(capture=lambda run: made.append(run) or run)


@pytest.mark.parametrize("norm", ["none", "batch", "ghost", "layer"])
def test_program_equals_the_tape_at_every_update(norm, captures):
    made, programs = captures
    model = network(norm)
    for update in range(6):
        tape, ray = step(model, seed=update)
        found, expected = losses(programs, tape, ray)
        assert (found is None) == (update == 0)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        move(model, ray)
    assert len(made) == 1


def test_other_step_sizes_need_no_capture(captures):
    made, programs = captures
    model = network()
    for factor in (1, 2, 3):
        tape, ray = step(model)
        ray = Ray(tape, ray.origin, ray.direction, [factor * eta for eta in STEP_SIZES])
        found, expected = losses(programs, tape, ray)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(made) == 1


def test_a_smaller_last_batch_keeps_the_program(captures):
    made, programs = captures
    model = network()
    sizes = [16, 16, 16, 7, 16, 16]
    found = [losses(programs, *step(model, size))[0] is not None for size in sizes]
    assert found == [False, True, True, False, True, True]
    assert len(made) == 1


CHANGES = {
    "a number": lambda k: lambda out, y: F.cross_entropy(out, y) * (1 + k),
    "a function": lambda k: lambda out, y: F.cross_entropy(out, y) if k % 2 else F.cross_entropy(out, y).exp(),
    "a type": lambda k: lambda out, y: F.cross_entropy(out.to((torch.float64, torch.float32)[k % 2]), y),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_another_signature_is_no_run_of_the_program(kind, captures):
    made, programs = captures
    model = network()
    for update in range(4):
        assert losses(programs, *step(model, loss=CHANGES[kind](update)))[0] is None
    assert not made


def test_a_parameter_in_other_memory_is_captured_anew(captures):
    made, programs = captures
    model = network()
    for _ in range(2):
        losses(programs, *step(model))
    model[0].weight.data = 2 * model[0].weight.data
    for expected in (None, True):
        found, by_tape = losses(programs, *step(model))
        assert (found is None) is (expected is None)
    torch.testing.assert_close(found, by_tape, rtol=1e-12, atol=0)
    assert len(made) == 2


REFUSED = {
    "random numbers": lambda out, y: F.cross_entropy(F.dropout(out.relu() * torch.bernoulli(out.sigmoid()), 0.5), y),
    "numbers on the host": lambda out, y: F.cross_entropy(out, y) + out[out > 0].mean(),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_waits_or_draws_is_not_captured(kind, captures):
    made, programs = captures
    model = network()
    for _ in range(3):
        assert programs.losses(*step(model, loss=REFUSED[kind])) is None
    assert not made


def test_a_failed_capture_is_not_tried_again():
    tries = []

    def capture(run):
        tries.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    programs, model = Graphs(capture), network()
    for _ in range(4):
        assert losses(programs, *step(model))[0] is None
    assert len(tries) == 1


@pytest.mark.parametrize("is_stale", [False, True])
def test_a_probe_with_programs_has_the_rows_of_one_without(is_stale, monkeypatch):
    """A program that does not get its inputs is noticed when rows are read."""
    monkeypatch.setattr(graphs, "CHECK_EVERY", 2)
    monkeypatch.setattr(graphs, "capture_on_cuda", lambda run: run)
    if is_stale:
        monkeypatch.setattr(torch, "_foreach_copy_", lambda *_: None)
    frames = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(graphs, "DEVICES", devices)
        model = network("ghost")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES) as probe:
            for seed in range(8):
                generator = torch.Generator().manual_seed(seed)
                x = 10 * torch.randn(16, 2, 4, 4, dtype=torch.float64, generator=generator)
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            with pytest.warns(UserWarning, match="graph") if is_stale and devices else nullcontext():
                frames.append(probe.frame())
    values = [np.stack(frame["losses"].tolist()) for frame in frames]
    assert np.allclose(*values, rtol=1e-9) is not is_stale
