"""The probe under DistributedDataParallel, for ``test_group``."""

import copy
import time
import warnings
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from rank_ghost import STEP_SIZES, table
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from landscape import LandscapeError, LandscapeProbe


class Network(nn.Module):
    """A network with dropout and running statistics; ``fails`` is called in each forward pass."""

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
    """Return a batch, which differs between ranks."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(8, 6, dtype=torch.float64, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def run(model, updates=4, before=lambda step: None, prepare=lambda probe: None, probed=True, **options):
    """Train; return the probe, and the state after training."""
    options = {"step_sizes": STEP_SIZES, "engine": "auto"} | options
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(10 + dist.get_rank())
    probe = LandscapeProbe(model, optimizer, criterion, **options)
    prepare(probe)
    if probed:
        probe.attach()
    else:
        probe.detach()
    for step in range(updates):
        before(step)
        optimizer.zero_grad()
        inputs, targets = batch(step)
        criterion(model(inputs), targets).backward()
        optimizer.step()
    probe.detach()
    state = {**model.state_dict(), **{f"{name}.grad": p.grad for name, p in model.named_parameters()}}
    return probe, state | {"random": torch.rand(4), "adam": optimizer.state_dict()["state"][0]["exp_avg_sq"]}


def message_of(function):
    """Return the error message of a function, or ``"nothing"``."""
    try:
        function()
    except LandscapeError as error:
        return str(error)
    return "nothing"


def bits(ranks, folder):
    return {
        options: [run(network(), probed=probed, **dict([options]))[1] for probed in (True, False)]
        for options in [("direction", "gradient"), ("direction", "update"), ("gradients", True)]
    }


def means(ranks, folder):
    """Return rows, and each rank's losses along the common gradient, evaluated one by one."""
    model, expected = network(), []
    replica = copy.deepcopy(model.module)

    def before(step):
        replica.load_state_dict(model.module.state_dict())
        inputs, targets = batch(step)
        state = torch.get_rng_state()
        gradient = mean_at(replica, inputs, targets, state, 0.0, None)[1]
        expected.append([mean_at(replica, inputs, targets, state, eta, gradient) for eta in [0.0, *STEP_SIZES]])

    probe, _ = run(model, before=before, gradients=True)
    return {"rows": table(probe), "expected": expected}


def mean_at(replica, inputs, targets, state, eta, gradient):
    """Return mean loss and mean gradient at one point of the ray."""
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


def run_with_failure(ranks, gradients):
    """Return steps and warnings of a run in which one rank fails at one update."""
    model, calls = network(), []

    def fail():
        calls.append(1)
        if len(calls) > 2:  # the forward pass of training, then points of the ray
            raise ValueError("failed on purpose")

    def before(step):
        calls.clear()
        model.module.fails = fail if step == 2 and ranks.rank == 1 else None

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        probe, _ = run(model, before=before, gradients=gradients, engine="loop")
    return list(probe.frame().step), [str(warning.message) for warning in seen]


def failures(ranks, folder):
    """Return messages of a rank that fails, after good updates and from the start."""
    found = {gradients: run_with_failure(ranks, gradients) for gradients in (False, True)}

    def broken(step):
        if ranks.rank == 1:
            raise LandscapeError("no step sizes")
        return STEP_SIZES

    found["from the start"] = message_of(lambda: run(network(), step_sizes=broken))
    found["other points"] = message_of(lambda: run(network(), step_sizes=lambda step: [0.1 + ranks.rank]))
    found["other number"] = message_of(lambda: run(network(), step_sizes=lambda step: [0.1] * (1 + ranks.rank)))
    found["other options"] = message_of(lambda: run(network(), every=1 + ranks.rank))
    return found


def writing(ranks, folder):
    probe, _ = run(network(), trace=folder / "run", steps_per_epoch=2)
    probe.trace.append({"epoch": 1, "train_loss": 0.5}, table="epochs")
    probe.trace.close()
    again = message_of(lambda: run(network(), trace=folder / "run"))
    return {"rows": len(probe.frame()), "columns": list(probe.frame().columns), "last": probe.last(), "again": again}


def wrapping(ranks, folder):
    """Return messages for misplaced wrappers, and results of wrappers that copy outputs."""
    found = {}
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def inner():
        with LandscapeProbe(model.module, optimizer, criterion := nn.CrossEntropyLoss(), step_sizes=STEP_SIZES):
            inputs, targets = batch(0)
            criterion(model(inputs), targets).backward()
            optimizer.step()

    found["inner"] = message_of(inner)
    found["nested"] = message_of(lambda: LandscapeProbe(nn.Sequential(model), optimizer, step_sizes=STEP_SIZES))
    found["compiled"] = message_of(
        lambda: LandscapeProbe(torch.compile(model, backend="eager"), optimizer, step_sizes=STEP_SIZES)
    )
    plain = table(run(network())[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: there are no unused parameters
        found["copies"] = table(run(network(find_unused_parameters=True))[0]) == plain
    found["engines"] = table(run(network(), engine="loop" if ranks.rank else "auto")[0])["losses"], plain["losses"]
    found["auto"] = table(run(network(), updates=6, engine="auto")[0])["losses"][:4], plain["losses"]
    return found | observed()


def observed():
    found = {}
    expected = table(run(network(), engine="loop")[0])["losses"]
    for name, choose in {"observed": lambda given, wrapper: given, "wrapper": lambda given, wrapper: wrapper}.items():
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        torch.manual_seed(10 + dist.get_rank())

        def closure(given, x, y, choose=choose, model=model):
            return nn.functional.cross_entropy(choose(given, model)(x), y)

        def loop(model=model, optimizer=optimizer, closure=closure):
            with LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES, engine="loop") as probe:
                for step in range(4):
                    optimizer.zero_grad()
                    probe.observe(closure, *batch(step)).backward()
                    optimizer.step()
            found["same"] = table(probe)["losses"] == expected

        found[name] = message_of(loop)
    return found


def clocks(ranks, folder):
    """Return the probed steps where one rank's own clock allows no further probe."""

    def prepare(probe):
        if ranks.rank == 1:
            probe._schedule._budget.share = 0

    probe, _ = run(network(), 40, lambda step: time.sleep(0.01), prepare, overhead=1.0)
    return list(probe.frame().step)


def sharing(ranks, folder):
    """Gather bytes of different length, and none."""
    return ranks.all_gather_bytes(b"word " * ranks.rank), ranks.all_gather_bytes(b"")


def joining(ranks, folder):
    """Return messages under Join, where the second rank has a batch less, without a probe and with one."""

    def train(attached):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES) if attached else nullcontext()
        with probe, Join([model]):
            for step in range(3 - ranks.rank):
                optimizer.zero_grad()
                inputs, targets = batch(step)
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()

    return {attached: message_of(partial(train, attached)) for attached in (False, True)}


TASKS = [bits, means, failures, writing, wrapping, joining, clocks, sharing]
