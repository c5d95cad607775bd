"""The page of claims: verdicts from traces with known ratios, and from trials."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from landscape import RECIPES, train
from landscape.errors import LandscapeError
from landscape.paper import claims
from landscape.paper.claims import AGREES, DIFFERS, UNTOLD, figure_claims, grid_claim, order_claims, recorded_claims
from landscape.paper.figures4_5 import comparison
from landscape.paper.norm_claims import norm_claims


def frames(scales, seeds=4):
    """Return updates whose range is a scale, and their epochs.

    Losses are the same for all norms, so that they have bins of equal loss.
    """
    random = np.random.default_rng(0)
    rows = []
    for (norm, groups), scale in scales.items():
        for seed in range(seeds):
            size = scale * np.exp(0.02 * random.standard_normal())
            for step in range(30):
                loss = 2 - step / 20
                losses = [loss, loss + size]
                rows.append(
                    {"run": f"{norm}{groups}-{seed}", "norm": norm, "groups": groups, "seed": seed, "step": step}
                    | {
                        "loss": loss,
                        "lr": 0.1 if step else 0.05,
                        "base_lr": 0.05,
                        "step_sizes": [0.1, 0.2],
                        "losses": losses,
                    }
                    | {"loss_min": losses[0], "loss_max": losses[1], "epoch": step / 30}
                )
    frame = pd.DataFrame(rows).astype({"groups": "Int64"})
    epochs = frame.groupby("run", as_index=False).agg(epoch=("step", "max"))
    return frame, epochs.assign(train_loss=0.5, test_accuracy=0.9)


NORMS = {("none", None): 4.0, ("batch", None): 1.0, ("ghost", 4): 1.5, ("ghost", 16): 3.0}


def verdicts(found, sentence):
    return {claim.measure: claim.verdict for claim in found if sentence in claim.sentence}


def test_figure_claims_agree():
    found = list(figure_claims(*frames(NORMS)))
    for band in ("GhostNorm (G=4)", "GhostNorm (G=16)", "No normalization"):
        for when in ("over training", "at equal loss"):
            assert verdicts(found, f"{band} is less smooth than BatchNorm, {when}") == {"range": AGREES}
    assert verdicts(found, "GhostNorm (G=16) is closer to No normalization") == {"range": AGREES}
    assert set(verdicts(found, "trains at learning rates up to 0.1").values()) == {AGREES}


def test_figure_claims_differ_and_untold():
    scales = {("none", None): 0.5, ("batch", None): 1.0, ("ghost", 4): 0.5, ("ghost", 16): 1.0}
    found = list(figure_claims(*frames(scales)))
    assert verdicts(found, "GhostNorm (G=4) is less smooth") == {"range": DIFFERS}
    assert verdicts(found, "GhostNorm (G=16) is less smooth") == {"range": UNTOLD}
    assert verdicts(found, "GhostNorm (G=16) is closer to No normalization") == {"range": DIFFERS}


def test_figure_claims_of_one_seed_cannot_be_told():
    found = list(figure_claims(*frames(NORMS, seeds=1)))
    assert set(verdicts(found, "less smooth").values()) == {UNTOLD}
    assert set(verdicts(found, "is closer to").values()) == {UNTOLD}


def test_figure_claims_diverged_runs():
    frame, epochs = frames(NORMS)
    diverged = epochs["run"].str.startswith("none")
    epochs.loc[diverged, "train_loss"] = np.nan
    epochs.loc[epochs["run"] == "batchNone-0", "test_accuracy"] = 0.1
    found = list(figure_claims(frame, epochs))
    assert set(verdicts(found, "No normalization trains").values()) == {DIFFERS}
    assert set(verdicts(found, "BatchNorm trains").values()) == {UNTOLD}


def trials(**accuracies):
    rows = [
        {"norm": norm, "seed": seed, "part": part, "test_accuracy": value / 100}
        for norm, values in accuracies.items()
        for seed, value in enumerate(values)
        for part in ("tuning", "test")
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0, ignore_index=True)


@pytest.mark.parametrize(
    ("ghost", "verdict"), [((91, 92, 93), AGREES), ((89, 89.9, 91.1), DIFFERS), ((91, 90.5, 91.5), UNTOLD)]
)
def test_order_claims(ghost, verdict):
    (claim,) = order_claims(trials(ghost=ghost, batch=(90, 91, 92.1)), [("seq", "ghost"), ("ghost", "batch")])
    assert (claim.sentence, claim.verdict) == ("GhostNorm attains more than BatchNorm", verdict)


@pytest.mark.parametrize(
    ("grid", "verdict"), [((90.1, 91, 92), AGREES), ((92, 93, 94.1), DIFFERS), ((93, 90, 95), UNTOLD)]
)
def test_grid_claim(grid, verdict):
    assert grid_claim(trials(seq=(90, 91, 92)), trials(seq=grid)).verdict == verdict


def test_norm_claims_agree():
    section = norm_claims()
    assert len(section.claims) == 9
    assert {claim.verdict for claim in section.claims} == {AGREES}


def test_recorded_claims(tmp_path, monkeypatch):
    runs = comparison(replace(RECIPES["digits"], epochs=2), (16, 32), (0, 1))
    monkeypatch.setattr(claims, "COMPARISONS", {("4", "small"): runs})
    for run in runs[:-1]:
        train(run, tmp_path / "traces" / "digits", device="cpu")
    (tmp_path / "table1-small").mkdir()
    trials(ghost=(91, 92), batch=(90, 91)).to_parquet(tmp_path / "table1-small" / "trials.parquet")
    figure, table = recorded_claims(tmp_path)
    assert figure.runs.startswith("7 of 8 runs")
    assert len(table.claims) == 1
    page = claims.markdown([figure, table], "landscape claims")
    assert all(claim.result in page for claim in (*figure.claims, *table.claims))


def test_recorded_claims_of_an_empty_folder(tmp_path):
    with pytest.raises(LandscapeError, match="must have traces"):
        recorded_claims(tmp_path)
