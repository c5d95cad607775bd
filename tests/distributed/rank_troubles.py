"""Errors of the probe of a sharded model, for ``test_fsdp``."""

import warnings

import torch
from rank_ghost import STEP_SIZES, table
from rank_probe import message_of
from rank_shards import batch, final_state, network, own, run
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from landscape import LandscapeError, LandscapeProbe, ray_losses


def writing(ranks, folder):
    """Write a trace, with an engine that does not fit."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sunk = []
        options = {"trace": folder / "run", "engine": "tape", "sinks": [sunk.append]}
        probe, _ = run(network("batch"), ranks.rank, ranks.size, **options)
    return {
        "rows": len(probe.frame()),
        "sunk": [row["step"] for row in sunk],
        "words": [str(warning.message) for warning in seen],
    }


def failures(ranks, folder):
    """Return results of a rank that fails at one update, and error messages."""
    found = {}
    for gradients, calls_before in ((False, 0), (False, 2), (True, 2)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found[gradients, calls_before] = (
                run_with_failure(ranks, gradients, calls_before),
                [str(w.message) for w in seen],
            )

    def broken(step):
        if ranks.rank == 1:
            raise LandscapeError("no step sizes")
        return STEP_SIZES

    def begun(**options):
        return message_of(lambda: run(network(), ranks.rank, ranks.size, **options))

    found["from the start"] = begun(step_sizes=broken)
    found["other number"] = begun(step_sizes=lambda step: [0.1] * (1 + ranks.rank))
    found["at once"] = message_of(lambda: run_with_failure(ranks, False, 0, at=0))
    return found


def run_with_failure(ranks, gradients, calls_before, at=2):
    """Return recorded steps, and final states with and without the probe."""

    def once(probed):
        model, calls = network("batch", dropout=0.2), []

        def fail():
            calls.append(1)
            if len(calls) > 1 + calls_before:  # the forward pass of training, then points of the ray
                raise LandscapeError("failed on purpose")

        def before(step):
            calls.clear()
            model.fails = fail if step == at and ranks.rank == 1 and probed else None

        return run(model, ranks.rank, ranks.size, before=before, gradients=gradients, probed=probed)

    (probe, with_probe), (_, without) = once(True), once(False)
    return list(probe.frame().step), with_probe, without


def observed(ranks, folder):
    """Return rows of observed and of captured losses."""
    model = network("batch")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(10 + ranks.rank)
    with LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES) as probe:
        for step in range(4):
            optimizer.zero_grad()
            inputs, targets = own(step, ranks.rank, ranks.size)
            loss = probe.observe(lambda given, x, y: nn.functional.cross_entropy(given(x), y), inputs, targets)
            loss.backward()
            optimizer.step()
    return table(probe), table(run(network("batch"), ranks.rank, ranks.size)[0])


def mistakes(ranks, folder):
    """Return error messages of models that cannot be probed."""
    model = network()
    inner = nn.Linear(2, 2)
    found = {"ray": message_of(lambda: ray_losses(model, lambda model: model(batch(0)[0]).sum(), {}, [0.1]))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        old = FullyShardedDataParallel(inner, device_id=torch.device("cpu"))
    found["old"] = message_of(
        lambda: LandscapeProbe(old, torch.optim.SGD(old.parameters(), lr=0.1), step_sizes=STEP_SIZES)
    )
    for name, spoil in {
        "hook": draw_with_each_gradient,
        "unreduced": lambda model: model.set_requires_gradient_sync(False),
    }.items():
        found[name] = run_spoiled(ranks, spoil)
    return found


def run_spoiled(ranks, spoil):
    """Return final states, and warnings about side effects of backward passes."""

    def once(probed):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            probe = LandscapeProbe(model, optimizer, nn.CrossEntropyLoss(), step_sizes=STEP_SIZES, gradients=True)
            if probed:
                probe.attach()
            else:
                probe.detach()
            for step in range(3):
                optimizer.zero_grad()
                model.set_requires_gradient_sync(True)
                inputs, targets = own(step, ranks.rank, ranks.size)
                probe.criterion(model(inputs), targets).backward()
                if step:
                    spoil(model)
                optimizer.step()
        return final_state(model, optimizer), [str(warning.message) for warning in seen]

    (with_probe, words), (without, _) = once(True), once(False)
    return with_probe, without, words


def draw_with_each_gradient(model):
    """Draw a random number with each gradient, which changes the RNG state."""
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: torch.rand(1))


TASKS = [writing, failures, observed, mistakes]
