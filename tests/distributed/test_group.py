"""The probe in two real processes that train one model; what they do is in ``rank_probe``."""

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
    """Against every rank's losses and gradients, evaluated one by one along the gradient that they have in common."""
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
def test_a_rank_that_cannot_measure_is_told_of_and_all_go_on(both, gradients):
    for rank in both[1]:
        steps, words = rank["failures"][gradients]
        assert steps == [0, 1, 3]
        assert words[-1] == "Step 2 is not in the trace: rank 1: out of luck"


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("from the start", "rank 1: no step sizes"),
        ("other points", "The ranks do not measure the same"),
        ("other number", "The ranks do not measure the same"),
        ("other options", "The ranks do not measure the same"),
    ],
)
def test_a_mistake_on_one_rank_is_an_error_on_all(both, cause, message):
    for rank in both[1]:
        assert rank["failures"][cause].startswith(message)


def test_one_rank_writes(both):
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
        ("inner", "not that of the captured loss .* give the probe the model that it returns, not the one inside"),
        ("nested", "Wrap the model as a whole, outermost"),
        ("compiled", "Wrap the model as a whole, outermost"),
        ("wrapper", "call the model that the closure is given"),
        ("observed", "nothing"),
    ],
)
def test_what_is_wrapped(both, how, message):
    for rank in both[1]:
        assert re.search(message, rank["wrapping"][how])


def test_a_wrapper_that_copies_outputs_and_observed_losses_change_nothing(both):
    for rank in both[1]:
        assert rank["wrapping"]["copies"]
        assert rank["wrapping"]["same"]


@pytest.mark.parametrize("how", ["engines", "auto"])
def test_ranks_may_choose_different_engines(both, how):
    for rank in both[1]:
        losses, expected = rank["wrapping"][how]
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)


def test_the_clock_of_the_first_rank_decides(both):
    first, second = (rank["clocks"] for rank in both[1])
    assert first == second
    assert len(first) > 1


def test_ranks_share_what_each_has_to_say(both):
    for rank in both[1]:
        assert rank["sharing"] == ([b"", b"word "], [b"", b""])


def test_a_process_alone_sends_nothing():
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
