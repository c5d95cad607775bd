"""GhostNorm as a layer, by accumulation with BatchNorm, and by processes with BatchNorm.

Gradients, recorded losses, and losses and gradients along the ray are equal; running statistics are not.
"""

import pytest
import rank_ghost
import rank_worker
import torch

MOMENTUM = 0.1
EVEN = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module", params=[2, 4], ids="{} groups".format)
def runs(request, tmp_path_factory):
    """Results by case and implementation; a list over the ranks for ranks."""
    groups = request.param
    ranks = rank_worker.launch("ghost", groups, tmp_path_factory.mktemp("ghost"))
    return {
        case: {by: rank_ghost.trained(case[0], by, groups, case[1], **options) for by in ("layer", "accumulation")}
        | {"ranks": [rank["ghost"][case] for rank in ranks]}
        for case, options in rank_ghost.ghost_cases(groups).items()
    }


def test_gradients_and_rays_are_equal(runs):
    assert {"gradient_distances" in by["layer"]["rows"] for by in runs.values()} == {True, False}
    for by in runs.values():
        rows = by["layer"]["rows"]
        assert len(rows["losses"]) == 3
        assert rows["losses"][0][-1] != pytest.approx(rows["loss"][0], rel=1e-3)  # the loss changes along the ray
        for other in (by["accumulation"], *by["ranks"]):
            torch.testing.assert_close(other["gradients"], by["layer"]["gradients"], **EVEN)
            torch.testing.assert_close(other["rows"], rows, **EVEN)


def test_running_statistics_differ(runs):
    """The layer moves once by the mean over the groups, accumulation once per group, each rank by its own group."""
    for by in runs.values():
        groups = len(by["ranks"])
        for name, batches in by["layer"]["inputs"].items():
            layer, accumulation, *ranks = [torch.tensor([[0.0], [1.0]]).double()] * (2 + groups)
            assert len(batches) == 3
            for batch in batches:
                own = [statistics(group) for group in batch.tensor_split(groups)]
                layer = moved(layer, sum(own) / groups)
                for group in own:
                    accumulation = moved(accumulation, group)
                ranks = [moved(*pair) for pair in zip(ranks, own, strict=True)]
            torch.testing.assert_close(kept(by["layer"], name), layer, **EVEN)
            torch.testing.assert_close(kept(by["accumulation"], name), accumulation, **EVEN)
            torch.testing.assert_close([kept(rank, name) for rank in by["ranks"]], ranks, **EVEN)
            torch.testing.assert_close(sum(ranks) / groups, layer, **EVEN)  # an average is linear
            assert not torch.allclose(accumulation, layer, rtol=1e-2)
            assert not torch.allclose(ranks[0], layer, rtol=1e-3)


def statistics(group):
    """Return mean and unbiased variance of each channel, (2, C)."""
    values = group.transpose(0, 1).flatten(1)
    return torch.stack([values.mean(1), values.var(1)])


def moved(running, new):
    return (1 - MOMENTUM) * running + MOMENTUM * new


def kept(run, name):
    return torch.stack([run["buffers"][f"{name}.running_mean"], run["buffers"][f"{name}.running_var"]])
