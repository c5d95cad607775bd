import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from landscape import RECIPES, make_norm
from landscape.errors import LandscapeError
from landscape.paper.tables1_2 import TABLES
from landscape.training.train import classify
from landscape.tuning.feasibility import check_feasible, seconds_per_training
from landscape.tuning.plan import TuningConfig, TuningPlan
from landscape.tuning.report import accuracies, caption, markdown
from landscape.tuning.strategies import Configuration
from landscape.tuning.tune import TuningBackend, tune

DIGITS = replace(RECIPES["classify-digits"], epochs=1, train_samples=600)
SMALL = TuningConfig(DIGITS, ("batch", "ghost", "seq"), groups=(2, 4), channel_groups=(1, 4))


def backend(folder):
    return TuningBackend(f"sqlite:///{folder}/tuning.sqlite3")


@pytest.fixture(scope="module")
def plan():
    return check_feasible(SMALL)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Use one thread, as each of two jobs on two cores does; sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def once(plan, tmp_path_factory):
    """Run a search; return its outcome, the folder of its database, and the recipes trained."""
    folder, trained = tmp_path_factory.mktemp("tuning"), []
    outcome = tune(plan, backend(folder), on_trained=lambda recipe, row: trained.append(recipe))
    return outcome, folder, trained


def accuracy(configuration, part="validation", **changes):
    """Train both seeds of a configuration; the slow reference implementation."""
    recipes = [
        replace(DIGITS, norm=configuration.norm, seed=seed, **configuration.options, **changes) for seed in (0, 1)
    ]
    values = [classify(recipe)[f"{part}_accuracy"] for recipe in recipes]
    return sum(values) / 2, values


def test_tune_matches_plain_search(plan, once):
    outcome, _, _ = once
    table = accuracies(outcome.trials, outcome.chosen)
    assert table.groupby("norm").chosen.sum().to_dict() == {"batch": 1, "ghost": 1, "seq": 1}
    table = table[table.chosen].set_index("norm")
    means = {groups: accuracy(Configuration("ghost", groups=groups))[0] for groups in (2, 4)}
    assert outcome.chosen["ghost"].groups == max(means, key=means.get)
    assert table.validation_accuracy["ghost"] == pytest.approx(max(means.values()), abs=1e-12)
    largest = max(groups for groups in (2, 4) if means[groups] >= max(means.values()) - 0.005)
    means = {each: accuracy(Configuration("seq", each, largest))[0] for each in (1, 4)}
    assert outcome.chosen["seq"] == Configuration("seq", max(means, key=means.get), largest)


def test_test_accuracy_after_training_on_held_out_samples(once):
    outcome, _, _ = once
    mean, values = accuracy(outcome.chosen["seq"], "test", validation=0, train_samples=900)
    table = accuracies(outcome.trials, outcome.chosen)
    row = table[table.chosen].set_index("norm").loc["seq"]
    assert table[~table.chosen].test_accuracy.isna().all()
    assert row.test_accuracy == pytest.approx(mean, abs=1e-12)
    assert row.test_accuracy_spread == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2), abs=1e-12)


def test_norms_share_trainings(plan, once):
    outcome, _, trained = once
    assert plan.counts() == (2 * (1 + 2 + 2), 2 * 3)
    assert len(trained) == len(set(trained)) == len(outcome.trials) == 16
    assert list(outcome.trials.part) == ["tuning"] * 10 + ["test"] * 6
    assert outcome.trials.validation_accuracy.isna().tolist() == [False] * 10 + [True] * 6


def test_tune_reuses_trainings(once):
    outcome, folder, _ = once
    again = tune(check_feasible(SMALL), backend(folder), on_trained=pytest.fail)
    assert again.chosen == outcome.chosen
    assert again.trials.equals(outcome.trials)
    trained = []
    wider = check_feasible(replace(SMALL, norms=("ghost",), groups=(2, 4, 8)))
    tune(wider, backend(folder), on_trained=lambda recipe, row: trained.append(recipe))
    assert [recipe.groups for recipe in trained if recipe.validation] == [8, 8]


def print_name(recipe, row):
    print(recipe.run_name)


@pytest.mark.multiprocess
def test_tune_two_jobs(once, tmp_path, capfd):
    outcome, _, trained = once
    both = tune(check_feasible(SMALL), backend(tmp_path), jobs=2, on_trained=print_name)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == sorted(recipe.run_name for recipe in trained)
    assert both.chosen == outcome.chosen
    varying = ["seconds", "started", "ended"]
    assert both.trials.drop(columns=varying).equals(outcome.trials.drop(columns=varying))


def test_tune_every_run_diverges(tmp_path):
    hopeless = check_feasible(TuningConfig(replace(DIGITS, lr=1e6), ("none",)))
    outcome = tune(hopeless, backend(tmp_path))
    assert outcome.chosen == {"none": None}
    assert set(outcome.trials.part) == {"tuning"}
    table = markdown(accuracies(outcome.trials, outcome.chosen), hopeless)
    assert table.splitlines()[-1] == "| No normalization | diverged | - | 2 |"


def test_tune_without_test_set(plan, once):
    _, folder, _ = once
    untested = replace(plan, samples={**plan.samples, "test": 0})
    outcome = tune(untested, backend(folder))
    assert set(outcome.trials.part) == {"tuning"}
    lines = markdown(accuracies(outcome.trials, outcome.chosen), untested).splitlines()
    assert lines[0] == "| norm | validation accuracy | test accuracy | runs |"
    # BatchNorm, and two each of GhostNorm and SeqNorm
    assert [line.split(" | ")[2] for line in lines[2:]] == ["-"] * 5


def test_table_and_caption(plan, once):
    outcome, _, _ = once
    lines = markdown(accuracies(outcome.trials, outcome.chosen), plan).splitlines()
    assert lines[0] == "| norm | validation accuracy | test accuracy (297 images) | runs |"
    batch = outcome.trials.query("norm == 'batch' and part == 'tuning'").validation_accuracy
    assert lines[2].startswith(f"| BatchNorm | {batch.mean():.2%} ± {batch.std():.2%} | ")
    assert [line.split(" | ")[0] for line in lines[3:5]] == ["| GhostNorm (G=2)", "| GhostNorm (G=4)"]
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


def test_check_feasible_impossible_configurations():
    plan = check_feasible(replace(SMALL, norms=("ghost", "group"), groups=(4, 128, 1000), channel_groups=(2, 8)))
    assert plan.possible == {
        "ghost": (Configuration("ghost", groups=4),),
        "group": (Configuration("group", 2),),
    }
    assert {each.groups or each.channel_groups: why.split(":")[0] for each, why in plan.impossible.items()} == {
        128: "groups=128 on a batch of 128 samples",
        1000: "groups=1000 on a batch of 128 samples",
        8: "channel_groups=8 on 300 channels",
    }
    assert plan.counts() == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": ("bath",)}, "norm='bath'"),
        ({"norms": ("batch", "group"), "channel_groups": (7,)}, r"norm='group'.*channel_groups=7 .*512 channels"),
        ({"norms": ("ghost",), "groups": ()}, r"norm='ghost': .*no numbers of groups"),
        ({"norms": ("ghost",), "groups": (0,)}, "groups=0:"),
        ({"strategy": "random"}, r"strategy='random'.*grid or sequential"),
        ({"tolerance": 1.5}, "tolerance=1.5: must be"),
        ({"tolerance": math.nan}, "tolerance=nan: must be"),
        ({"runs": 0}, "runs=0: must be"),
        ({"recipe": RECIPES["digits"]}, "recipe='digits': must hold out"),
        ({"recipe": replace(DIGITS, epochs=0)}, "epochs=0:"),
        ({"recipe": replace(DIGITS, dataset="cats")}, "'cats': unknown data set"),
    ],
)
def test_check_feasible_errors(change, message):
    with pytest.raises(LandscapeError, match=message):
        check_feasible(replace(SMALL, **change))


def test_tune_jobs_out_of_range(plan, tmp_path):
    with pytest.raises(LandscapeError, match="jobs=0: must be"):
        tune(plan, backend(tmp_path), jobs=0)


def test_seconds_per_training_grows_with_epochs(plan):
    few, many = (
        seconds_per_training(replace(plan, tuning=replace(SMALL, recipe=replace(DIGITS, epochs=epochs))))
        for epochs in (1, 1000)
    )
    assert 0 < few * 50 < many


def test_table_of_a_grid_has_the_best_groups_of_each_channel_groups():
    """As table 1 of the paper: a row for each G_M of GhostNorm, and one for each G_C of SeqNorm."""
    scores = {(1, 2): 0.8, (1, 4): 0.9, (2, 2): 0.7, (2, 4): math.nan}
    rows = [
        {"norm": "seq", "channel_groups": each[0], "groups": each[1], "validation_accuracy": score}
        for each, score in scores.items()
    ]
    rows += [
        {"norm": "ghost", "channel_groups": None, "groups": groups, "validation_accuracy": 0.5} for groups in (2, 4)
    ]
    trials = pd.DataFrame(rows).assign(part="tuning", train_loss=1.0, test_accuracy=math.nan)
    trials = trials.astype({"channel_groups": "Int64", "groups": "Int64"})
    chosen = {"ghost": Configuration("ghost", groups=4), "seq": Configuration("seq", 1, 4)}
    table = accuracies(trials, chosen)
    assert table.configuration.tolist() == [
        "GhostNorm (G=2)",
        "GhostNorm (G=4)",
        "SeqNorm (G_C=1, G_M=4)",
        "SeqNorm (G_C=2, G_M=2)",
    ]
    assert table.chosen.tolist() == [False, True, True, False]
    paper = TABLES["1", "paper"]
    plan = TuningPlan(TuningConfig(paper.recipe), {}, {}, {"train": 45000, "validation": 5000, "test": 10000})
    names = [line.split(" | ")[0] for line in markdown(table, plan).splitlines()[2:]]
    assert names[1:3] == ["| GhostNorm, G_M = 4 (32 groups of 16)", "| SeqNorm, G_C = 1, G_M = 4 (32 groups of 16)"]


def test_devices_of_a_recipe():
    """Groups on 8 devices are 8 times as many of the batch, and BatchNorm has one of each device."""
    torch.manual_seed(0)
    x = torch.randn(64, 4, dtype=torch.float64)
    for norm, options in {"batch": {}, "ghost": {"groups": 2}, "seq": {"groups": 2, "channel_groups": 2}}.items():
        name, whole = replace(DIGITS, norm=norm, devices=8, **options).layer
        parts = [make_norm(norm, **options)(4).double()(part) for part in x.chunk(8)]
        torch.testing.assert_close(make_norm(name, **whole)(4).double()(x), torch.cat(parts))


@pytest.mark.parametrize("changes", [{"norm": "ghost-mean"}, {"norm": "ghost", "ghost_by": "accumulation"}])
def test_devices_that_cannot_be_reproduced(changes):
    with pytest.raises(LandscapeError, match="devices=8"):
        replace(DIGITS, devices=8, **changes).resolve()
