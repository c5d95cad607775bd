import math
from dataclasses import replace

import pytest
import torch

from landscape import RECIPES
from landscape.errors import LandscapeError
from landscape.training.train import classify
from landscape.tuning.feasibility import check_feasible, seconds_per_training
from landscape.tuning.plan import TuningConfig
from landscape.tuning.report import accuracies, caption, markdown
from landscape.tuning.strategies import Configuration
from landscape.tuning.tune import TuningBackend, tune

DIGITS = replace(RECIPES["classify-digits"], epochs=1, train_samples=600)
SMALL = TuningConfig(DIGITS, ("batch", "ghost", "seq"), groups=(2, 4), channel_groups=(1, 4))


def place(folder):
    return TuningBackend(f"sqlite:///{folder}/tuning.sqlite3")


@pytest.fixture(scope="module")
def plan():
    return check_feasible(SMALL)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As each of two processes has on two cores: more threads add numbers up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def once(plan, tmp_path_factory):
    """A tuning, where it is kept, and what was trained for it."""
    folder, trained = tmp_path_factory.mktemp("tuning"), []
    outcome = tune(plan, place(folder), on_trained=lambda recipe, row: trained.append(recipe))
    return outcome, folder, trained


def accuracy(configuration, part="validation", **changes):
    """The slow twin: train both seeds of a configuration here and now."""
    recipes = [
        replace(DIGITS, norm=configuration.norm, seed=seed, **configuration.options, **changes) for seed in (0, 1)
    ]
    values = [classify(recipe)[f"{part}_accuracy"] for recipe in recipes]
    return sum(values) / 2, values


def test_the_choice_is_that_of_a_plain_search(plan, once):
    outcome, _, _ = once
    table = accuracies(outcome.trials, outcome.chosen).set_index("norm")
    means = {groups: accuracy(Configuration("ghost", groups=groups))[0] for groups in (2, 4)}
    assert outcome.chosen["ghost"].groups == max(means, key=means.get)
    assert table.validation_accuracy["ghost"] == pytest.approx(max(means.values()), abs=1e-12)
    largest = max(groups for groups in (2, 4) if means[groups] >= max(means.values()) - 0.005)
    means = {each: accuracy(Configuration("seq", each, largest))[0] for each in (1, 4)}
    assert outcome.chosen["seq"] == Configuration("seq", max(means, key=means.get), largest)


def test_the_test_accuracy_is_of_the_chosen_one_trained_on_all_that_was_used(once):
    outcome, _, _ = once
    mean, values = accuracy(outcome.chosen["seq"], "test", validation=0, train_samples=900)
    row = accuracies(outcome.trials, outcome.chosen).set_index("norm").loc["seq"]
    assert row.test_accuracy == pytest.approx(mean, abs=1e-12)
    assert row.test_accuracy_spread == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2), abs=1e-12)


def test_what_two_norms_need_is_trained_once(plan, once):
    outcome, _, trained = once
    assert plan.counts() == (2 * (1 + 2 + 2), 2 * 3)
    assert len(trained) == len(set(trained)) == len(outcome.trials) == 16
    assert list(outcome.trials.part) == ["tuning"] * 10 + ["test"] * 6
    assert outcome.trials.validation_accuracy.isna().tolist() == [False] * 10 + [True] * 6


def test_the_same_again_trains_nothing_and_a_wider_search_only_what_is_new(once):
    outcome, folder, _ = once
    again = tune(check_feasible(SMALL), place(folder), on_trained=pytest.fail)
    assert again.chosen == outcome.chosen
    assert again.trials.equals(outcome.trials)
    trained = []
    wider = check_feasible(replace(SMALL, norms=("ghost",), groups=(2, 4, 8)))
    tune(wider, place(folder), on_trained=lambda recipe, row: trained.append(recipe))
    assert [recipe.groups for recipe in trained if recipe.validation] == [8, 8]


def say(recipe, row):
    print(recipe.run_name)


def test_two_processes_come_to_the_same(once, tmp_path, capfd):
    outcome, _, trained = once
    both = tune(check_feasible(SMALL), place(tmp_path), jobs=2, on_trained=say)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == sorted(recipe.run_name for recipe in trained)
    assert both.chosen == outcome.chosen
    unlike = ["seconds", "started", "ended"]
    assert both.trials.drop(columns=unlike).equals(outcome.trials.drop(columns=unlike))


def test_norms_whose_every_run_diverges_are_told_and_not_trained_on(tmp_path):
    hopeless = check_feasible(TuningConfig(replace(DIGITS, lr=1e6), ("none",)))
    outcome = tune(hopeless, place(tmp_path))
    assert outcome.chosen == {"none": None}
    assert set(outcome.trials.part) == {"tuning"}
    table = markdown(accuracies(outcome.trials, outcome.chosen), hopeless)
    assert table.splitlines()[-1] == "| No normalization | every configuration diverged | - | - |"


def test_without_a_test_set_nothing_is_trained_for_it(plan, once):
    _, folder, _ = once
    untested = replace(plan, samples={**plan.samples, "test": 0})
    outcome = tune(untested, place(folder))
    assert set(outcome.trials.part) == {"tuning"}
    lines = markdown(accuracies(outcome.trials, outcome.chosen), untested).splitlines()
    assert lines[0] == "| norm | validation accuracy | test accuracy | runs |"
    assert [line.split(" | ")[2] for line in lines[2:]] == ["-"] * 3


def test_the_table_and_its_caption_say_what_was_done(plan, once):
    outcome, _, _ = once
    lines = markdown(accuracies(outcome.trials, outcome.chosen), plan).splitlines()
    assert lines[0] == "| norm | validation accuracy | test accuracy (297 images) | runs |"
    batch = outcome.trials.query("norm == 'batch' and part == 'tuning'").validation_accuracy
    assert lines[2].startswith(f"| BatchNorm | {batch.mean():.2%} ± {batch.std():.2%} | ")
    assert lines[3].startswith(f"| GhostNorm (G={outcome.chosen['ghost'].groups}) | ")
    words = caption(plan, outcome.trials)
    for part in (
        "Recipe classify-digits: SimpleNet on digits, 1 epoch, 600 images to train on and 300 held out",
        "the chosen configuration is trained on all 900",
        "over the seeds 0, 1",
        "G_M of 2, 4; G_C of 1, 4",
        "within 0.50% of the best, then G_C with it (sequential)",
        "16 trainings took ",
        "(cpu).",
    ):
        assert part in words


def test_what_cannot_be_trained_is_left_out_and_told():
    plan = check_feasible(replace(SMALL, norms=("ghost", "group"), groups=(4, 128, 1000), channel_groups=(2, 8)))
    assert plan.possible == {
        "ghost": (Configuration("ghost", groups=4),),
        "group": (Configuration("group", 2),),
    }
    assert {each.groups or each.channel_groups: why.split(":")[0] for each, why in plan.impossible.items()} == {
        128: "128 samples in 128 groups leave a group with a single value per channel, so its variance is undefined. "
        "Use fewer groups or a larger batch, so that each group has two samples or more.",
        1000: "groups=1000 on a batch of 128 samples",
        8: "channel_groups=8 on 300 channels",
    }
    assert plan.counts() == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": ("bath",)}, "Unknown norm 'bath'"),
        ({"norms": ("batch", "group"), "channel_groups": (7,)}, "norm 'group': channel_groups=7 on 512 channels"),
        ({"norms": ("ghost",), "groups": ()}, "norm 'ghost': there are no groups to try"),
        ({"norms": ("ghost",), "groups": (0,)}, "groups=0 is out of range"),
        ({"strategy": "random"}, "Unknown strategy 'random'; choose one of grid, sequential"),
        ({"tolerance": 1.5}, "tolerance=1.5 is out of range"),
        ({"tolerance": math.nan}, "tolerance=nan is out of range"),
        ({"runs": 0}, "runs=0 is out of range"),
        ({"recipe": RECIPES["digits"]}, "'digits' holds nothing out"),
        ({"recipe": replace(DIGITS, epochs=0)}, "epochs=0 is out of range"),
        ({"recipe": replace(DIGITS, dataset="cats")}, "no data set 'cats'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(change, message):
    with pytest.raises(LandscapeError, match=message):
        check_feasible(replace(SMALL, **change))


def test_the_number_of_jobs_is_checked(plan, tmp_path):
    with pytest.raises(LandscapeError, match="jobs=0 is out of range"):
        tune(plan, place(tmp_path), jobs=0)


def test_the_estimate_grows_with_the_epochs(plan):
    few, many = (
        seconds_per_training(replace(plan, tuning=replace(SMALL, recipe=replace(DIGITS, epochs=epochs))))
        for epochs in (1, 1000)
    )
    assert 0 < few * 50 < many
