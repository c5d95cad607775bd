import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape import LandscapeError, LandscapeProbe
from landscape.ray.engines.choice import ROUNDS, EngineChoice
from landscape.ray.engines.loop import loop
from landscape.ray.engines.registry import ENGINES, OPT_IN
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray

STEP_SIZES = [0.1, 0.2, 0.3, 0.4]


def ray_of(model, inputs, step_sizes=STEP_SIZES):
    targets = torch.arange(len(inputs)) % 3
    objective = Objective.of(model, lambda model: F.cross_entropy(model(inputs), targets))
    objective.terms[0].value = objective(dict(model.named_parameters())).detach()
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Ray(objective, origin, {name: torch.ones_like(tensor) for name, tensor in origin.items()}, step_sizes)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


def inputs(rows=12):
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Notes(dict):
    def __call__(self, **facts):
        self.update(facts)


def test_auto_records_its_selection():
    notes, ray = Notes(), ray_of(network(), inputs())
    choice = EngineChoice("auto", None, notes)
    expected = ray_of(network(), inputs())
    for _ in range(ROUNDS + 2):
        torch.testing.assert_close(choice.losses(ray), loop(expected), rtol=1e-12, atol=0)
    assert notes["engine"] in ENGINES
    assert notes["engine_seconds"][notes["engine"]] <= notes["engine_seconds"]["loop"]
    assert set(notes["engine_seconds"]) <= set(ENGINES) - set(OPT_IN) - {"channels_last"}
    assert notes["engine_refused"] == {}
    assert notes["peak_memory"] > sum(parameter.nbytes for parameter in network().parameters())


def test_convolutions_add_channels_last():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double()
    notes = Notes()
    choice = EngineChoice("auto", None, notes)
    ray = ray_of(model, torch.randn(5, 2, 4, 4, dtype=torch.float64))
    for _ in range(2):
        choice.losses(ray)
    choice._settle("loop", ray)
    assert "channels_last" in notes["engine_seconds"]


def test_refused_engine_is_recorded_with_reason():
    class Branching(nn.Linear):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            return outputs if outputs.mean() > 100 else -outputs

    notes = Notes()
    choice = EngineChoice("auto", None, notes)
    for _ in range(ROUNDS + 1):
        choice.losses(ray_of(Branching(6, 3).double(), inputs()))
    assert "data-dependent control flow" in notes["engine_refused"]["stacked"]
    assert "\n" not in notes["engine_refused"]["stacked"]


def test_loop_above_max_memory_raises():
    with pytest.raises(
        LandscapeError, match=r"max_memory=1000: a single point of the ray takes [0-9,]+ bytes; allow more"
    ):
        EngineChoice("auto", 1000, Notes()).losses(ray_of(network(), inputs()))


def test_max_memory_bounds_the_chunk():
    """Not all points fit in one pass."""
    ray = ray_of(network(), inputs(2000), [0.1 * k for k in range(8)])
    notes = Notes()
    EngineChoice("loop", None, notes).losses(ray)
    choice = EngineChoice("stacked", int(3.5 * notes["peak_memory"]), notes)
    torch.testing.assert_close(choice.losses(ray), loop(ray), rtol=1e-12, atol=0)
    assert 1 <= choice._engines["stacked"].chunk <= 3
    assert notes["peak_memory"] <= 3.5 * choice._peaks["loop"]
    torch.testing.assert_close(choice.losses(ray), loop(ray), rtol=1e-12, atol=0)


def test_out_of_memory_halves_the_chunk():
    class Filling(nn.Linear):
        passes = 0

        def forward(self, inputs):
            Filling.passes += 1
            if Filling.passes in (2, 3):  # the first one is the engine's check
                raise torch.OutOfMemoryError("no memory")
            return super().forward(inputs)

    engine, ray = ENGINES["stacked"](), ray_of(Filling(6, 3).double(), inputs())
    Filling.passes = 0
    with torch.no_grad():
        torch.testing.assert_close(engine(ray), loop(ray))
    assert engine.chunk == 1


def test_late_failure_falls_back_to_loop():
    class Turning(nn.Linear):
        turned = False

        def forward(self, inputs):
            outputs = super().forward(inputs)
            return outputs if not Turning.turned or outputs.mean() > 100 else -outputs

    notes, ray = Notes(), ray_of(Turning(6, 3).double(), inputs())
    choice = EngineChoice("stacked", None, notes)
    choice.losses(ray)
    assert notes["engine"] == "stacked"
    Turning.turned = True
    with pytest.warns(UserWarning, match="engine 'stacked' does not fit this model .*evaluated by the loop"):
        losses = choice.losses(ray)
    torch.testing.assert_close(losses, loop(ray))
    assert notes["engine"] == "loop"
    choice.losses(ray)


def test_nonfinite_ray_selects_nothing():
    notes, model = Notes(), network()
    choice = EngineChoice("affine", None, notes)
    assert choice.losses(ray_of(model, inputs() * float("nan"))).isnan().all()
    assert notes == {}
    choice.losses(ray_of(model, inputs()))
    assert notes["engine"] == "affine"


def test_selection_is_in_metadata(tmp_path):
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"step_sizes": STEP_SIZES, "trace": tmp_path / "run", "max_memory": 10**9}
    with LandscapeProbe(model, optimizer, criterion, **options):
        for _ in range(6):
            optimizer.zero_grad()
            criterion(model(inputs()), torch.arange(12) % 3).backward()
            optimizer.step()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {"engine", "engine_seconds", "engine_refused", "peak_memory", "max_memory"} <= set(facts)
