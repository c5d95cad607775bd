"""What the processes of the tests of data parallelism do: ``torchrun rank_worker.py TASK FOLDER``."""

import copy
import os
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from landscape import LandscapeProbe, UserError, make_norm
from landscape.experiment import data_parallel
from landscape.models import ResNet, SimpleNet
from landscape.norms import BatchNorm
from landscape.ranks import joined, own_device

STEP_SIZES = [0.05, 0.1, 0.4]
BUILDS = {
    "SimpleNet": lambda norm: SimpleNet(3 * 8 * 8, 10, norm),
    "ResNet": lambda norm: ResNet(8, 3, 10, norm),
}


def launch(task, processes, folder):
    """What each rank has found out; a test fails, and does not wait for ever, if one of them does not end."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__, task, folder]
    subprocess.run([sys.executable, *map(str, command)], check=True, timeout=300)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


# GhostNorm in three ways


def batches(samples, updates=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        inputs = torch.randn(samples, 3, 8, 8, dtype=torch.float64, generator=generator)
        yield inputs, torch.randint(0, 10, (samples,), generator=generator)


def trained(build, by, groups, samples, **options):
    """Three updates with GhostNorm implemented ``by`` layer, accumulation or ranks; all that is to be compared."""
    torch.manual_seed(0)
    inner = BUILDS[build](make_norm("ghost", groups=groups) if by == "layer" else make_norm("batch")).double()
    model = data_parallel(inner) if by == "ranks" else inner
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradients, inputs_of = [], {name: [] for name, norm in inner.named_modules() if isinstance(norm, BatchNorm)}
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, **options) as probe:
        for inputs, targets in batches(samples):
            optimizer.zero_grad()
            for own_inputs, own_targets, weight in parts(inputs, targets, by, groups):
                with watched(inner, inputs_of):
                    loss = weight * criterion(model(own_inputs), own_targets)
                loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in inner.parameters()]))
            optimizer.step()
    return {"rows": table(probe), "gradients": gradients, "buffers": dict(inner.named_buffers()), "inputs": inputs_of}


@contextmanager
def watched(model, inputs_of):
    """Within it, note what each norm is given."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda norm, args, into=into: into.append(args[0].detach()))
        for name, into in inputs_of.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def parts(inputs, targets, by, groups):
    """What is differentiated by itself, with its weight in the mean over the batch."""
    if by == "layer":
        return [(inputs, targets, 1.0)]
    pairs = list(zip(inputs.tensor_split(groups), targets.tensor_split(groups), strict=True))
    if by == "accumulation":
        return [(x, y, len(x) / len(inputs)) for x, y in pairs]
    x, y = pairs[dist.get_rank()]
    return [(x, y, len(x) * groups / len(inputs))]


def ghost_cases(groups):
    """What is trained, on how many samples (groups are of one size, or of two), and options of the probe."""
    by_loop, by_affine = {"gradients": True, "engine": "loop"}, {"engine": "affine"}
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


# The probe among ranks


class Network(nn.Module):
    """A network with dropout and running statistics; a forward pass fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.fails = None

    def forward(self, inputs):
        if self.fails:
            self.fails()
        return self.layers(inputs)


def network(**options):
    torch.manual_seed(0)
    return DistributedDataParallel(Network().double(), **options)


def batch(step):
    """Another one on each rank."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(8, 6, dtype=torch.float64, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def run(model, updates=4, before=lambda step: None, prepare=lambda probe: None, probed=True, **options):
    """The user's own loop; the rows, and all that training leaves behind."""
    options = {"step_sizes": STEP_SIZES, "engine": "affine"} | options
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(10 + dist.get_rank())
    probe = LandscapeProbe(model, optimizer, criterion, **options)
    prepare(probe)
    if probed:
        probe.attach()
    for step in range(updates):
        before(step)
        optimizer.zero_grad()
        inputs, targets = batch(step)
        criterion(model(inputs), targets).backward()
        optimizer.step()
    probe.detach()
    state = {**model.state_dict(), **{f"{name}.grad": p.grad for name, p in model.named_parameters()}}
    return probe, state | {"random": torch.rand(4), "adam": optimizer.state_dict()["state"][0]["exp_avg_sq"]}


def table(probe):
    """What was measured, as plain lists."""
    rows = probe.frame()[["step", "loss", "grad_norm", "slope", "losses", "gradient_distances"]].dropna(axis="columns")
    return {name: [list(value) if hasattr(value, "__len__") else value for value in rows[name]] for name in rows}


def told(function):
    """What a mistake is answered with."""
    try:
        function()
    except UserError as error:
        return str(error)
    return "nothing"


def bits(ranks, folder):
    return {
        options: [run(network(), probed=probed, **dict([options]))[1] for probed in (True, False)]
        for options in [("direction", "gradient"), ("direction", "update"), ("gradients", True)]
    }


def means(ranks, folder):
    """Rows, and the plain way to them: every rank's losses along the common gradient, one by one."""
    model, expected = network(), []
    replica = copy.deepcopy(model.module)

    def before(step):
        replica.load_state_dict(model.module.state_dict())
        inputs, targets = batch(step)
        state = torch.get_rng_state()
        gradient = each(replica, inputs, targets, state, 0.0, None)[1]
        expected.append([each(replica, inputs, targets, state, eta, gradient) for eta in [0.0, *STEP_SIZES]])

    probe, _ = run(model, before=before, gradients=True)
    return {"rows": table(probe), "expected": expected}


def each(replica, inputs, targets, state, eta, gradient):
    """Mean loss and mean gradient at one point of the ray."""
    point = copy.deepcopy(replica)
    with torch.no_grad():
        for parameter, direction in zip(point.parameters(), gradient or [], strict=bool(gradient)):
            parameter -= eta * direction
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        loss = nn.functional.cross_entropy(point(inputs), targets)
    own = [loss.detach(), *torch.autograd.grad(loss, list(point.parameters()))]
    for tensor in own:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return own[0], own[1:]


def unlucky(ranks, gradients):
    """Steps and warnings where one rank cannot measure one of the updates."""
    model, calls = network(), []

    def fail():
        calls.append(1)
        if len(calls) > 2:  # the forward pass of training, then points of the ray
            raise ValueError("out of luck")

    def before(step):
        calls.clear()
        model.module.fails = fail if step == 2 and ranks.rank == 1 else None

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        probe, _ = run(model, before=before, gradients=gradients)
    return list(probe.frame().step), [str(warning.message) for warning in seen]


def failures(ranks, folder):
    """A rank that cannot measure: once training has begun well, and from the start."""
    found = {gradients: unlucky(ranks, gradients) for gradients in (False, True)}

    def broken(step):
        if ranks.rank == 1:
            raise UserError("no step sizes")
        return STEP_SIZES

    found["from the start"] = told(lambda: run(network(), step_sizes=broken))
    found["other points"] = told(lambda: run(network(), step_sizes=lambda step: [0.1 + ranks.rank]))
    found["other number"] = told(lambda: run(network(), step_sizes=lambda step: [0.1] * (1 + ranks.rank)))
    found["other options"] = told(lambda: run(network(), every=1 + ranks.rank))
    return found


def writing(ranks, folder):
    probe, _ = run(network(), trace=folder / "run", steps_per_epoch=2)
    probe.trace.append({"epoch": 1, "train_loss": 0.5}, table="epochs")
    probe.trace.close()
    again = told(lambda: run(network(), trace=folder / "run"))
    return {"rows": len(probe.frame()), "columns": list(probe.frame().columns), "last": probe.last(), "again": again}


def wrapping(ranks, folder):
    """The model inside, a wrapper further in, wrappers that copy outputs, and losses that are observed."""
    found = {}
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def inner():
        with LandscapeProbe(model.module, optimizer, criterion := nn.CrossEntropyLoss(), step_sizes=STEP_SIZES):
            inputs, targets = batch(0)
            criterion(model(inputs), targets).backward()
            optimizer.step()

    found["inner"] = told(inner)
    found["nested"] = told(lambda: LandscapeProbe(nn.Sequential(model), optimizer, step_sizes=STEP_SIZES))
    found["compiled"] = told(
        lambda: LandscapeProbe(torch.compile(model, backend="eager"), optimizer, step_sizes=STEP_SIZES)
    )
    plain = table(run(network())[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: there are no unused parameters
        found["copies"] = table(run(network(find_unused_parameters=True))[0]) == plain
    found["engines"] = table(run(network(), engine="loop" if ranks.rank else "affine")[0])["losses"], plain["losses"]
    found["auto"] = table(run(network(), updates=6, engine="auto")[0])["losses"][:4], plain["losses"]
    return found | observed(plain)


def observed(plain):
    found = {}
    for name, choose in {"observed": lambda given, wrapper: given, "wrapper": lambda given, wrapper: wrapper}.items():
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        torch.manual_seed(10 + dist.get_rank())

        def closure(given, x, y, choose=choose, model=model):
            return nn.functional.cross_entropy(choose(given, model)(x), y)

        def loop(model=model, optimizer=optimizer, closure=closure):
            with LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES, engine="affine") as probe:
                for step in range(4):
                    optimizer.zero_grad()
                    probe.observe(closure, *batch(step)).backward()
                    optimizer.step()
            found["same"] = table(probe)["losses"] == plain["losses"]

        found[name] = told(loop)
    return found


def clocks(ranks, folder):
    """A rank that by its own clock would not probe again."""

    def prepare(probe):
        if ranks.rank == 1:
            probe._schedule._budget.share = 0

    probe, _ = run(network(), 40, lambda step: time.sleep(0.01), prepare, overhead=1.0)
    return list(probe.frame().step)


TASKS = {
    "ghost": [ghost],
    "probe": [bits, means, failures, writing, wrapping, clocks],
}


def main(task, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with joined(own_device("cpu")) as ranks:
        results = {function.__name__: function(ranks, folder) for function in TASKS[task]}
        torch.save(results, folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # torch may abort an interpreter that ends while something still holds a process group
