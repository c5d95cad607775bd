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
    assert len(caught) == 1
    with probe:
        train(model, optimizer)
    train(model, optimizer)
    assert len(probe.frame()) == 3


def test_entered_probe_is_not_disturbed_by_another():
    model, optimizer = make()
    with LandscapeProbe(model, optimizer) as probe:
        other = LandscapeProbe(model, optimizer)
        with pytest.warns(UserWarning, match="with probe:") as caught:
            train(model, optimizer)
    assert len(caught) == 1
    assert len(probe.frame()) == 3
    assert other.step == 0


def test_probe_is_not_kept_alive_and_says_nothing_then():
    model, optimizer = make()
    gc.disable()
    try:
        gone = weakref.ref(LandscapeProbe(model, optimizer))
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
