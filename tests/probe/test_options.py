"""Options of the probe, and what a new one takes: a field."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from torch import nn

from landscape import LandscapeProbe
from landscape.errors import LandscapeError
from landscape.probe.options import MULTIPLES, ProbeKeywords, ProbeOptions


def train(model, optimizer, steps=2, **options):
    with LandscapeProbe(model, optimizer, nn.MSELoss(), **options) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            probe.criterion(model(torch.ones(3, 2)), torch.zeros(3, 1)).backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = group.get("lr", 0) / 2
    return probe


def test_step_sizes_default_to_multiples_of_the_current_learning_rate():
    model = nn.Linear(2, 1)
    frame = train(model, torch.optim.SGD(model.parameters(), lr=0.5)).frame()
    assert [list(row) for row in frame.step_sizes] == [[m * lr for m in MULTIPLES] for lr in (0.5, 0.25)]
    assert ProbeOptions() == ProbeOptions(step_sizes=MULTIPLES, relative=True)


def test_step_sizes_default_needs_a_learning_rate():
    class WithoutRate(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            """Stay."""

    model = nn.Linear(2, 1)
    with pytest.raises(LandscapeError, match=r"learning rate.*step_sizes"):
        train(model, WithoutRate(model.parameters()))


def test_step_sizes_may_be_a_function():
    options = ProbeOptions(step_sizes=lambda step: [step, 2 * step])
    assert options.step_sizes_at(3, lr=0.1) == [3, 6]
    assert isinstance(options.metadata()["step_sizes"], str)
    assert options.resume_signature()["step_sizes"] is None


def test_every_option_is_a_keyword_and_a_fact():
    signature = inspect.signature(LandscapeProbe)
    for field in fields(ProbeOptions):
        assert signature.parameters[field.name].default == field.default
        assert field.name in ProbeOptions().metadata() or field.name in ("engine", "sinks")


def test_keywords_for_type_checkers_are_the_options():
    assert get_type_hints(ProbeKeywords) == get_type_hints(ProbeOptions)
    assert not ProbeKeywords.__required_keys__


def test_an_unknown_option_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="stepsizes"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.5), stepsizes=[0.1])
