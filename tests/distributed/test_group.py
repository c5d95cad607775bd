"""The probe in two real processes under DistributedDataParallel, which run ``rank_probe``."""

import re

import pytest
import rank_worker
import torch

from landscape.distributed.group import SINGLE_PROCESS, unwrap_parallel


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, rank_worker.launch("probe", 2, folder)


def test_probing_changes_no_bit_on_any_rank(both):
    for rank in both[1]:
        for with_probe, without in rank["bits"].values():
            torch.testing.assert_close(with_probe, without, rtol=0, atol=0)


def test_rows_are_means_over_the_ranks(both):
    """They match losses and gradients of each rank, evaluated one by one."""
    for rank in both[1]:
        rows, expected = rank["means"]["rows"], rank["means"]["expected"]
        for step, ((loss, gradient), *points) in enumerate(expected):
            flat = torch.cat([part.flatten() for part in gradient])
            assert rows["loss"][step] == pytest.approx(loss.item(), rel=1e-12)
            assert rows["losses"][step] == pytest.approx([there.item() for there, _ in points], rel=1e-12)
            assert rows["grad_norm"][step] == pytest.approx(flat.norm().item(), rel=1e-12)
            assert rows["slope"][step] == pytest.approx(flat.square().sum().item(), rel=1e-12)
            distances = [(torch.cat([part.flatten() for part in there]) - flat).norm().item() for _, there in points]
            assert rows["gradient_distances"][step] == pytest.approx(distances, rel=1e-9)


@pytest.mark.parametrize("gradients", [False, True])
def test_failing_rank_skips_the_update_on_all(both, gradients):
    for rank in both[1]:
        steps, words = rank["failures"][gradients]
        assert steps == [0, 1, 3]
        assert words[-1] == "Step 2 is not in the trace: rank 1: failed on purpose"


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("from the start", "rank 1: no step sizes"),
        ("other points", "same on all ranks"),
        ("other number", "same on all ranks"),
        ("other options", "same on all ranks"),
    ],
)
def test_error_on_one_rank_is_raised_on_all(both, cause, message):
    for rank in both[1]:
        assert message in rank["failures"][cause]


def test_first_rank_writes(both):
    folder, (first, second) = both
    assert sorted(path.name for path in (folder / "run").glob("[!.]*")) == [
        "epochs-000000000.parquet",
        "run.json",
        "updates-000000000.parquet",
    ]
    first, second = first["writing"], second["writing"]
    assert (first["rows"], second["rows"]) == (4, 0)
    assert set(second["columns"]) < set(first["columns"])
    assert {"loss", "losses", "loss_min", "step_sizes"} < set(second["columns"])
    assert first["last"]["losses"] == second["last"]["losses"]
    assert "holds a run already" in first["again"]
    assert "rank 0: " in second["again"]
    assert "holds a run already" in second["again"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("inner", "gradient is not .*DistributedDataParallel"),
        ("nested", "must be outermost"),
        ("compiled", "must be outermost"),
        ("wrapper", "observed loss .*DistributedDataParallel.*probe.observe"),
        ("observed", "nothing"),
    ],
)
def test_misplaced_wrapper_raises(both, how, message):
    for rank in both[1]:
        assert re.search(message, rank["wrapping"][how])


def test_uneven_inputs_are_refused(both):
    for rank in both[1]:
        assert rank["joining"][False] == "nothing"
        assert "Join" in rank["joining"][True]


def test_copied_outputs_and_observed_losses_match(both):
    for rank in both[1]:
        assert rank["wrapping"]["copies"]
        assert rank["wrapping"]["same"]


@pytest.mark.parametrize("how", ["engines", "auto"])
def test_ranks_may_use_different_engines(both, how):
    for rank in both[1]:
        losses, expected = rank["wrapping"][how]
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)


def test_first_rank_allows_probes(both):
    first, second = (rank["clocks"] for rank in both[1])
    assert first == second
    assert len(first) > 1


def test_all_gather_bytes(both):
    for rank in both[1]:
        assert rank["sharing"] == ([b"", b"word "], [b"", b""])


def test_single_process_sends_nothing():
    tensor = torch.ones(3)
    assert SINGLE_PROCESS.all_mean(lambda: {"a": tensor})["a"] is tensor
    assert SINGLE_PROCESS.run_on_all(lambda: 5) == 5
    assert SINGLE_PROCESS.all_gather_bytes(b"word") == [b"word"]
    assert [SINGLE_PROCESS.broadcast_bool(True), SINGLE_PROCESS.broadcast_bool(False)] == [True, False]
    assert (
        SINGLE_PROCESS.rank,
        SINGLE_PROCESS.size,
        SINGLE_PROCESS.is_writer,
        SINGLE_PROCESS.has_untracked_ranks(),
    ) == (0, 1, True, False)
    with pytest.raises(KeyError):
        SINGLE_PROCESS.all_mean(lambda: {}["missing"])
    model = torch.nn.Linear(1, 1)
    assert unwrap_parallel(model) == (model, SINGLE_PROCESS)
