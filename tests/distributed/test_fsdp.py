"""The probe of a model that ``fully_shard`` has sharded over real processes."""

import json
import re

import pytest
import rank_shards
import rank_worker
import torch
from rank_ghost import table

EQUAL = {"rtol": 0, "atol": 0, "equal_nan": True}


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def shards(request, tmp_path_factory):
    return rank_worker.launch("shards", request.param, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, rank_worker.launch("troubles", 2, folder)


def test_probing_changes_no_bit_on_any_rank(shards):
    for rank in shards:
        for with_probe, without in rank["bits"].values():
            torch.testing.assert_close(with_probe, without, **EQUAL)


def test_rows_match_one_process(shards):
    """One process has the whole batch, and GhostNorm with a group per rank where ranks have BatchNorm."""
    size = len(shards)
    expected = {}
    for name, (_, norm, options) in rank_shards.cases(size).items():
        expected[name] = table(rank_shards.run(rank_shards.network(norm, sharded=False), **options)[0])
    expected["replicated"] = expected["gradients"]
    for rank in shards:
        assert ("replicated" in rank["rows"]) == (size == 4)
        for name, rows in rank["rows"].items():
            torch.testing.assert_close(rows, expected[name], rtol=1e-9, atol=1e-12)


def test_first_rank_writes_and_loop_evaluates(two):
    folder, ranks = two
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert [rank["writing"]["rows"] for rank in ranks] == [4, 0]
    assert [rank["writing"]["sunk"] for rank in ranks] == [[0, 1, 2, 3], []]
    assert (facts["ranks"], facts["engine"]) == (2, "loop")
    assert facts["checks"]["gradient"]["rest"] < 1e-9
    assert facts["checks"]["loss_at_zero"]["recorded"] == pytest.approx(facts["checks"]["loss_at_zero"]["evaluated"])
    for rank in ranks:
        (words,) = rank["writing"]["words"]
        assert re.search("tape cannot: .*sharded", words)


@pytest.mark.parametrize(("gradients", "point"), [(False, 0), (False, 2), (True, 2)])
def test_failing_pass_blocks_no_rank(two, gradients, point):
    for rank in two[1]:
        (steps, with_probe, without), words = rank["failures"][gradients, point]
        assert steps == [0, 1, 3]
        assert words == ["Step 2 is not in the trace: rank 1: failed on purpose"]
        torch.testing.assert_close(with_probe, without, **EQUAL)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("from the start", "rank 1: no step sizes"),
        ("other number", "same on all ranks"),
        ("at once", "rank 1: failed on purpose"),
    ],
)
def test_error_on_one_rank_is_raised_on_all(two, cause, message):
    for rank in two[1]:
        assert message in rank["failures"][cause]


def test_observed_losses_match(two):
    for rank in two[1]:
        observed, captured = rank["observed"]
        assert observed == captured


@pytest.mark.parametrize(
    ("cause", "message"), [("hook", "hooks of parameters"), ("unreduced", r"set_requires_gradient_sync\(False\)")]
)
def test_gradients_with_side_effects_are_skipped(two, cause, message):
    for rank in two[1]:
        with_probe, without, words = rank["mistakes"][cause]
        assert [bool(re.search(message, word)) for word in words] == [True, True]
        torch.testing.assert_close(with_probe, without, **EQUAL)


@pytest.mark.parametrize(("cause", "message"), [("ray", "sharded.*LandscapeProbe"), ("old", "fully_shard")])
def test_unsupported_model_raises(two, cause, message):
    for rank in two[1]:
        assert re.search(message, rank["mistakes"][cause])
