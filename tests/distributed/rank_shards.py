"""The probe of a sharded model, for ``test_fsdp``."""

import itertools

import torch
from rank_ghost import STEP_SIZES, table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from landscape import LandscapeProbe, make_norm
from landscape.distributed.parameter_space import local


class Network(nn.Module):
    """Layers of odd sizes, so that shards are uneven or empty, with a frozen and an unused parameter."""

    def __init__(self, norm, dropout=0.0):
        super().__init__()
        sizes = list(itertools.pairwise([6, 7, 5]))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(*size), norm(size[1]), nn.ReLU(), nn.Dropout(dropout)) for size in sizes
        )
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.fails = None

    def forward(self, inputs):
        for at, layer in enumerate(self.layers):
            inputs = layer(inputs)
            if self.fails and at == 0:
                self.fails()
        return self.head(inputs) * self.scale


def network(norm="layer", dropout=0.0, sharded=True, double=True, **options):
    torch.manual_seed(0)
    model = Network(NORMS[norm], dropout)
    model = model.double() if double else model
    if sharded:
        for layer in model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
    return model


NORMS = {
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
    "ghost": make_norm("ghost", groups=2),
    "ghost4": make_norm("ghost", groups=4),
}


def batch(step, samples=48):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(samples, 6, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(0, 3, (samples,), generator=generator)


def own(step, rank, size):
    """Return this rank's part of the batch."""
    return [tensor.chunk(size)[rank] for tensor in batch(step)]


def run(model, rank=0, size=1, updates=4, before=lambda step: None, probed=True, accumulate=1, clip=None, **options):
    """Train; return the probe, and the state after training on this rank."""
    options = {"step_sizes": STEP_SIZES} | options
    optimizer = options.pop("optimizer", torch.optim.Adam)(model.parameters(), lr=0.01)
    criterion, kind = nn.CrossEntropyLoss(), next(model.parameters()).dtype
    torch.manual_seed(10 + rank)
    probe = LandscapeProbe(model, optimizer, criterion, **options)
    if probed:
        probe.attach()
    else:
        probe.detach()
    for step in range(updates):
        before(step)
        optimizer.zero_grad()
        parts = list(zip(*(tensor.chunk(accumulate) for tensor in own(step, rank, size)), strict=True))
        for at, (inputs, targets) in enumerate(parts):
            if accumulate > 1 and size > 1:
                model.set_requires_gradient_sync(at == len(parts) - 1)
            (criterion(model(inputs.to(kind)), targets) / len(parts)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    probe.detach()
    return probe, final_state(model, optimizer)


def final_state(model, optimizer):
    """Return all state that a probe could change."""
    reshard(model)
    held = {name: local(parameter) for name, parameter in model.named_parameters()}
    grads = {f"{n}.grad": None if p.grad is None else local(p.grad) for n, p in model.named_parameters()}
    moments = {
        (at, name): local(value)
        for at, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    return held | grads | moments | dict(model.named_buffers()) | {"random": torch.rand(4)}


def bits(ranks, folder):
    """Return final states with and without the probe, by case."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    momentum = {"optimizer": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9)}
    cases = {
        "gradient": ({"norm": "batch", "dropout": 0.2}, {}),
        "update": ({"norm": "ghost", "dropout": 0.2}, {"direction": "update"} | momentum),
        "gradients": ({"norm": "batch", "dropout": 0.2}, {"gradients": True} | momentum),
        "accumulation": ({"norm": "batch", "dropout": 0.2}, {"accumulate": 2}),
        "accumulated gradients": ({"norm": "ghost"}, {"accumulate": 2, "gradients": True}),
        "mixed precision": ({"double": False, "mp_policy": half}, {"gradients": True}),
        "gathered": ({"norm": "batch", "reshard_after_forward": False}, {"direction": "update"}),
    }
    if ranks.size == 4:
        cases = {name: cases[name] for name in ("update", "accumulated gradients")}
        cases["replicated"] = ({"norm": "batch", "mesh": replicated()}, {"gradients": True})
    return {name: [trained(ranks, *case, probed) for probed in (True, False)] for name, case in cases.items()}


def trained(ranks, build, options, probed):
    model = network(**build)
    kept = build.get("reshard_after_forward") is False
    model.set_reshard_after_backward(not kept)  # if kept, the optimizer steps with gathered parameters

    def before(step):
        if step == 2:
            evaluate(model)
        if kept:
            reshard(model)

    return run(model, ranks.rank, ranks.size, before=before, probed=probed, **options)[1]


def reshard(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def evaluate(model):
    """Make a forward pass that leaves the outermost parameters gathered."""
    model.eval()
    with torch.no_grad():
        model(batch(99)[0].to(next(model.parameters()).dtype))
    model.train()


def cases(size):
    """Return norms of the sharded model and of one process that record the same, and options."""
    return {
        "update": ("layer", "layer", {"direction": "update"}),
        "gradients": ("layer", "layer", {"gradients": True}),
        "accumulation": ("layer", "layer", {"accumulate": 2, "gradients": True}),
        "clipped": ("layer", "layer", {"clip": 0.01}),
        "groups": ("batch", "ghost" if size == 2 else "ghost4", {"gradients": True}),
    }


def rows(ranks, folder):
    found = {}
    for name, (norm, _, options) in cases(ranks.size).items():
        found[name] = table(run(network(norm), ranks.rank, ranks.size, **options)[0])
    if ranks.size == 4:
        found["replicated"] = table(run(network(mesh=replicated()), ranks.rank, ranks.size, gradients=True)[0])
    return found


def replicated():
    """Return a mesh of two halves of the ranks, each of which holds all shards."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


TASKS = [bits, rows]
