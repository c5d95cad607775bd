import pytest
import torch
from torch import nn

from benchmarks.launches import count
from landscape.ray import ray as ray_module
from landscape.ray.loss_module import LossModule
from landscape.ray.ray import ParametersAlongRay, PointBuffer, Ray
from landscape.ray.snapshot import ForwardSnapshot

LARGE = 40


class Own(torch.Tensor):
    """A tensor of a class of its own."""


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


PAIRS = {
    "matrix": lambda: (random(3, 4), random(3, 4)),
    "number": lambda: (random(), random()),
    "empty": lambda: (random(0, 4), random(0, 4)),
    "large": lambda: (random(10, 4), random(10, 4)),
    "double": lambda: (random(5, dtype=torch.float64), random(5, dtype=torch.float64)),
    "half": lambda: (random(5, dtype=torch.bfloat16), random(5, dtype=torch.bfloat16)),
    "direction in double": lambda: (random(5), random(5, dtype=torch.float64)),
    "direction in half": lambda: (random(5), random(5, dtype=torch.bfloat16)),
    "complex": lambda: (random(5, dtype=torch.complex64), random(5)),
    "transposed": lambda: (random(3, 4).t(), random(4, 3)),
    "expanded": lambda: (random(3, 4), random(4).expand(3, 4)),
    "parameter": lambda: (nn.Parameter(random(3)), nn.Parameter(random(3))),
    "subclass": lambda: (random(3).as_subclass(Own), random(3)),
    "not finite": lambda: (torch.tensor([torch.inf, torch.nan, 1.0]), torch.tensor([1.0, 1.0, torch.inf])),
}


@pytest.fixture
def parameters(monkeypatch):
    """Origin and direction of all kinds of parameters."""
    monkeypatch.setattr(ray_module, "LARGE", LARGE)
    torch.manual_seed(0)
    pairs = {name: pair() for name, pair in PAIRS.items()}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def test_moves_equal_subtractions(parameters):
    origin, direction = parameters
    buffer = PointBuffer({name: torch.empty_like(tensor) for name, tensor in origin.items()}, origin, direction)
    held = dict(buffer.tensors)
    for eta in (0.3, -2.0, 0.0):
        buffer.move_to(eta)
        for name, tensor in held.items():
            expected = torch.sub(origin[name], direction[name], alpha=eta, out=torch.empty_like(origin[name]))
            assert torch.equal(bits(tensor), bits(expected)), name
            assert buffer.tensors[name] is tensor


@torch.no_grad()
def test_parameter_without_direction_is_restored():
    origin = {"moved": random(3), "still": random(3)}
    buffer = PointBuffer({name: torch.empty(3) for name in origin}, origin, {"moved": random(3)})
    for eta in (0.5, 1.0):
        buffer.move_to(eta)
        assert torch.equal(buffer.tensors["still"], origin["still"])
        buffer.tensors["still"].zero_()


@torch.no_grad()
def test_launches_of_a_move():
    """They depend on the types of the parameters and on large ones, not on the number of parameters."""

    def launches(*origin):
        parameters = dict(enumerate(origin))
        buffer = PointBuffer({at: torch.empty_like(one) for at, one in parameters.items()}, parameters, parameters)
        return count("cpu", lambda: buffer.move_to(0.1))

    small, double = [random(5) for _ in range(50)], [random(5, dtype=torch.float64) for _ in range(50)]
    assert launches(*small) == launches(*small[:3]) == 2
    assert launches(*small, *double) == 4
    assert launches(*small, random(ray_module.LARGE)) == 3
    assert launches(random(0)) == 0


class Buffers(nn.Module):
    """Model that overwrites its buffers, and gives them another memory."""

    def __init__(self, number):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        for at in range(number):
            self.register_buffer(f"mean{at}", torch.arange(3.0))
            self.register_buffer(f"count{at}", torch.tensor(at))
        self.register_buffer("mean_again", self.mean0)
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("rows", torch.arange(3).expand(2, 3))
        self.register_buffer("sparse", torch.eye(3).to_sparse())

    def forward(self):
        total = self.sparse.to_dense().sum() + self.rows.sum() + self.empty.sum()
        for name, buffer in self.named_buffers(remove_duplicate=False):
            if name.startswith(("mean", "count")):
                total = total + buffer.sum()
                buffer.add_(1)
        self.mean0.data = torch.zeros(7)
        self.sparse.zero_()
        return total + self.weight.sum()


def snapshot_of(number):
    model = Buffers(number)
    snapshot = ForwardSnapshot.capture(LossModule(model))
    return model, snapshot, lambda: snapshot.evaluate_at(lambda model: model(), {}, [lambda: None] * 3)


def test_buffers_are_the_same_at_all_points():
    model, _, evaluate = snapshot_of(4)
    expected = 3 + 2 * 3 + 4 * 3 + 6 + 2 + (3 + 3)  # the second sum of `mean0` is that of `mean_again`
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    held = dict(model.named_buffers())
    with torch.no_grad():
        losses = evaluate()
    assert [loss.item() for loss in losses] == [losses[0].item()] * 3 == [expected] * 3
    for name, buffer in model.named_buffers():
        assert buffer is held[name]
        assert torch.equal(buffer.to_dense(), before[name].to_dense())


@torch.no_grad()
def test_launches_of_buffers():
    """They do not depend on the number of buffers."""

    def launches(number):
        _, snapshot, _ = snapshot_of(number)
        return count("cpu", lambda: snapshot.evaluate_at(lambda model: model.weight.sum(), {}, [lambda: None]))

    assert launches(20) == launches(2) < 8


def test_parameters_along_ray_keep_their_tensors(parameters):
    origin, direction = ({"p": one["matrix"], "q": one["double"]} for one in parameters)
    along = ParametersAlongRay(Ray(None, origin, direction, [0.1, 0.2]))
    held = dict(along.point)
    for move, eta in zip(along.moves([0.1, 0.2]), (0.1, 0.2), strict=True):
        move()
        for name, tensor in held.items():
            assert along.point[name] is tensor
            assert torch.equal(tensor, torch.sub(origin[name], direction[name], alpha=eta))
