"""A probe that was made, and never entered."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from landscape import LandscapeProbe


def make():
    model = nn.Linear(4, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(model, optimizer, updates=3):
    for _ in range(updates):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def test_one_warning_and_entered_later():
    model, optimizer = make()
    probe = LandscapeProbe(model, optimizer)
    with pytest.warns(UserWarning, match="with probe:") as caught:
        train(model, optimizer)
    assert [warning.filename for warning in caught] == [__file__]
    with probe:
        train(model, optimizer)
    train(model, optimizer)
    assert len(probe.frame()) == 3


def test_hooks_of_others_run_after_it():
    """They are iterated over while the optimizer steps."""
    model, optimizer = make()
    probes = [LandscapeProbe(model, optimizer) for _ in range(2)]
    calls = []
    optimizer.register_step_pre_hook(lambda *arguments: calls.append(arguments))
    with pytest.warns(UserWarning, match="with probe:") as caught:
        train(model, optimizer)
    assert (len(caught), len(calls)) == (len(probes), 3)


@pytest.mark.parametrize("first", ["held", "dropped"])
def test_entered_probe_beside_one_that_is_not(first):
    """As after a notebook's cell that is run twice."""
    model, optimizer = make()
    other = LandscapeProbe(model, optimizer)
    if first == "dropped":
        del other
    with LandscapeProbe(model, optimizer) as probe:
        late = LandscapeProbe(model, optimizer)
        train(model, optimizer)
    assert len(probe.frame()) == 3
    assert late.step == 0


def test_probe_is_not_kept_alive_and_says_nothing_then():
    model, optimizer = make()
    gc.disable()
    try:
        gone = weakref.ref(LandscapeProbe(model, optimizer))
        optimizer.register_step_pre_hook(lambda *arguments: None)
        train(model, optimizer)
        assert gone() is None
    finally:
        gc.enable()


def test_detached_probe_says_nothing():
    model, optimizer = make()
    probe = LandscapeProbe(model, optimizer)
    probe.detach()
    train(model, optimizer)
    assert probe.step == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_optimizer_can_be_copied(copied):
    model, optimizer = make()
    probe = LandscapeProbe(model, optimizer)
    assert copied(optimizer).state_dict() == optimizer.state_dict()
    assert probe.step == 0
