"""Training with GhostNorm in three implementations, for ``test_ghost_by``."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from landscape import LandscapeProbe, make_norm
from landscape.norms.layers import BatchNorm
from landscape.training.experiment import data_parallel
from landscape.training.models import ResNet, SimpleNet

STEP_SIZES = [0.05, 0.1, 0.4]
BUILDS = {
    "SimpleNet": lambda norm: SimpleNet(3 * 8 * 8, 10, norm),
    "ResNet": lambda norm: ResNet(8, 3, 10, norm),
}


def batches(samples, updates=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        inputs = torch.randn(samples, 3, 8, 8, dtype=torch.float64, generator=generator)
        yield inputs, torch.randint(0, 10, (samples,), generator=generator)


def trained(build, by, groups, samples, **options):
    """Return the results of three updates with GhostNorm implemented ``by`` layer, accumulation or ranks."""
    torch.manual_seed(0)
    inner = BUILDS[build](make_norm("ghost", groups=groups) if by == "layer" else make_norm("batch")).double()
    model = data_parallel(inner) if by == "ranks" else inner
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradients, inputs_of = [], {name: [] for name, norm in inner.named_modules() if isinstance(norm, BatchNorm)}
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, **options) as probe:
        for inputs, targets in batches(samples):
            optimizer.zero_grad()
            for own_inputs, own_targets, weight in parts(inputs, targets, by, groups):
                with recorded_inputs(inner, inputs_of):
                    loss = weight * criterion(model(own_inputs), own_targets)
                loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in inner.parameters()]))
            optimizer.step()
    return {"rows": table(probe), "gradients": gradients, "buffers": dict(inner.named_buffers()), "inputs": inputs_of}


@contextmanager
def recorded_inputs(model, inputs_of):
    """Record the inputs of each norm within the body."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda norm, args, into=into: into.append(args[0].detach()))
        for name, into in inputs_of.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def parts(inputs, targets, by, groups):
    """Return the parts of the batch with a backward pass of their own, with their weights in the mean loss."""
    if by == "layer":
        return [(inputs, targets, 1.0)]
    pairs = list(zip(inputs.tensor_split(groups), targets.tensor_split(groups), strict=True))
    if by == "accumulation":
        return [(x, y, len(x) / len(inputs)) for x, y in pairs]
    x, y = pairs[dist.get_rank()]
    return [(x, y, len(x) * groups / len(inputs))]


def ghost_cases(groups):
    """Return models, numbers of samples (divisible by the groups or not), and options of the probe."""
    by_loop, by_affine = {"gradients": True, "engine": "loop"}, {"engine": "auto"}
    return {
        ("SimpleNet", 4 * groups): by_affine,
        ("SimpleNet", 4 * groups + 1): by_loop,
        ("ResNet", 4 * groups): by_loop,
        ("ResNet", 4 * groups + 1): by_affine,
    }


def ghost(ranks, folder):
    return {
        case: trained(case[0], "ranks", ranks.size, case[1], **options)
        for case, options in ghost_cases(ranks.size).items()
    }


def table(probe):
    """Return the rows as plain lists."""
    rows = probe.frame()[["step", "loss", "grad_norm", "slope", "losses", "gradient_distances"]].dropna(axis="columns")
    return {name: [list(value) if hasattr(value, "__len__") else value for value in rows[name]] for name in rows}


TASKS = [ghost]
