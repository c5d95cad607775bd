"""Measures compared with closed forms and with a loop over rows."""

import numpy as np
import pandas as pd
import pytest
from recordings import frame, without

from landscape.analysis.measures import measured
from landscape.errors import LandscapeError
from landscape.names import MEASURES

NAN, INF = np.nan, np.inf


def quadratic_rows(step_sizes, updates=5, dimensions=7, seed=0):
    """Return updates on ``L(theta) = theta'H theta / 2 + b'theta`` along random directions, and ``(H, d)`` of each."""
    generator = np.random.default_rng(seed)
    rows, truths = [], []
    for _ in range(updates):
        hessian, (b, theta, d) = generator.normal(size=(dimensions, dimensions)), generator.normal(size=(3, dimensions))
        hessian += hessian.T

        def loss(theta, hessian=hessian, b=b):
            return theta @ hessian @ theta / 2 + b @ theta

        gradient = hessian @ theta + b
        there = [theta - eta * d for eta in step_sizes]
        row = {
            "loss": loss(theta),
            "slope": gradient @ d,
            "direction_norm": np.linalg.norm(d),
            "step_sizes": step_sizes,
            "losses": [loss(point) for point in there],
            "gradient_distances": [np.linalg.norm(hessian @ point + b - gradient) for point in there],
        }
        rows.append(row)
        truths.append((hessian, d))
    return pd.DataFrame(rows), truths


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step_sizes", [[0.1, 0.2, 0.4], [0.3], [-0.5, 0.25, 1.0], [-0.2, -0.1]])
def test_measured_quadratic(step_sizes):
    rows, truths = quadratic_rows(step_sizes)
    smallest, largest = np.min(np.abs(step_sizes)), np.max(np.abs(step_sizes))
    for measure in MEASURES:
        rows = measured(rows, measure)
    for row, (hessian, d) in zip(rows.itertuples(), truths, strict=True):
        change, bend = np.linalg.norm(hessian @ d), d @ hessian @ d
        close([row.predictiveness_min, row.predictiveness_max], [smallest * change, largest * change])
        close([row.beta, row.beta_min, row.beta_max], change / np.linalg.norm(d))
        close([row.gap_min, row.gap_max], np.sort([smallest**2 * bend / 2, largest**2 * bend / 2]))
        close([row.curvature_min, row.curvature_max], bend / (d @ d))
        assert (row.loss_min, row.loss_max) == (min(row.losses), max(row.losses))


def test_measured_step_size_zero():
    with_zero, _ = quadratic_rows([0.0, 0.1, 0.2])
    without_zero, _ = quadratic_rows([0.1, 0.2])
    for measure in ("beta", "curvature"):
        close(measured(with_zero, measure).filter(like=measure), measured(without_zero, measure).filter(like=measure))
    assert set(measured(with_zero, "predictiveness")["predictiveness_min"]) == {0.0}
    gaps = measured(with_zero, "gap")
    assert ((gaps["gap_min"] == 0) | (gaps["gap_max"] == 0)).all()


def test_measured_step_size_zero_alone():
    rows, _ = quadratic_rows([0.0])
    assert measured(rows, "beta")["beta"].isna().all()
    assert measured(rows, "curvature")[["curvature_min", "curvature_max"]].isna().all(axis=None)
    assert (measured(rows, "gap")["gap_max"] == 0).all()


def row_by_row(rows, measure):
    """Compute the definitions row by row."""
    extremes = []
    for row in rows.to_dict("records"):
        lists = [row[name] for name in ("step_sizes", "losses", "gradient_distances")]
        if lists[1] is None or lists[2] is None or len(lists[0]) == 0:
            extremes.append((NAN, NAN))
            continue
        eta, losses, distances = map(np.array, lists)
        with np.errstate(all="ignore"):
            gap = losses - (row["loss"] - eta * row["slope"])
            moved = np.abs(eta) * row["direction_norm"]
            values = {
                "loss": losses,
                "predictiveness": distances,
                "beta": [np.max((distances / moved)[eta != 0])],
                "gap": gap,
                "curvature": (2 * gap / moved**2)[eta != 0],
            }[measure]
        extremes.append((np.min(values), np.max(values)))
    return np.array(extremes)


EDGE_CASES = pd.DataFrame(
    [
        ([0.1, 0.2], [1.0, 2.0], [3.0, 4.0], 1.5, 1.0, 1.0),
        ([0.1], [1.0], [3.0], 1.5, 1.0, 2.0),
        (None, None, None, 1.5, 1.0, 2.0),
        ([0.1, 0.2], None, None, 1.5, 1.0, 2.0),
        ([0.1, 0.0, 0.3], [1.0, NAN, 2.0], [3.0, 4.0, 5.0], 1.5, 1.0, 2.0),
        ([0.1, 0.2, 0.3], [1.0, INF, 2.0], [NAN, 4.0, INF], 1.5, 1.0, 2.0),
        ([], [], [], 1.5, 1.0, 2.0),
        ([0.1, 0.2], [INF, -INF], [INF, INF], INF, 1.0, 2.0),
        ([0.1, 0.2], [1.0, 2.0], [0.0, 4.0], 1.5, 1.0, 0.0),
        ([0.1, 0.2], [1.0, 2.0], [0.0, 4.0], 1.5, NAN, NAN),
        ([0.5, 0.25], [-1.0, 2.0], [0.0, 4.0], 1.5, -1.0, 3.0),
    ],
    columns=["step_sizes", "losses", "gradient_distances", "loss", "slope", "direction_norm"],
)


@pytest.mark.parametrize("kind", ["object", "arrow", "arrays"])
@pytest.mark.parametrize("measure", MEASURES)
def test_measured_row_by_row(measure, kind):
    rows = EDGE_CASES.copy()
    for name in ("step_sizes", "losses", "gradient_distances"):
        if kind == "arrow":
            rows[name] = rows[name].astype(frame(steps=1)[name].dtype)
        elif kind == "arrays":
            rows[name] = pd.Series([None if v is None else np.array(v) for v in EDGE_CASES[name]], dtype=object)
    found = measured(rows, measure)[[f"{measure}_min", f"{measure}_max"]].to_numpy()
    expected = row_by_row(EDGE_CASES, measure)
    assert np.isnan(expected).any()
    assert np.isfinite(expected).any()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_measured_keeps_index():
    rows = pd.concat([frame(steps=9), frame(steps=4, seed=1)])  # an index with duplicates
    part = rows[rows["step"] % 2 == 1]
    for measure in MEASURES:
        whole = measured(rows, measure)
        np.testing.assert_array_equal(
            measured(part, measure)[f"{measure}_max"], whole[f"{measure}_max"][rows["step"] % 2 == 1]
        )


def test_measured_twice():
    rows = measured(frame(steps=3), "gap")
    assert measured(rows, "gap") is rows
    assert measured(rows, "loss") is rows  # the trace holds the extremes of the losses


@pytest.mark.parametrize(
    ("measure", "lacking", "message"),
    [
        ("predictiveness", "gradient_distances", "predictiveness.* requires gradient_distances.*probe --gradients"),
        ("beta", "gradient_distances", "beta.* requires gradient_distances and direction_norm.*gradients=True"),
        ("gap", "slope", "gap.* requires slope.*format version 2"),
        ("curvature", "slope", "curvature.* requires slope and direction_norm.*loss"),
    ],
)
def test_measured_missing_column(measure, lacking, message):
    for rows in (without(frame(steps=2), lacking), frame(steps=2).drop(columns=lacking)):
        with pytest.raises(LandscapeError, match=message):
            measured(rows, measure)


def test_measured_unknown_measure():
    with pytest.raises(LandscapeError, match=r"measure='sharpness': .*loss, predictiveness, beta"):
        measured(frame(steps=2), "sharpness")


def test_measured_wrong_count():
    rows = quadratic_rows([0.1, 0.2])[0]
    rows["losses"] = [losses[: 1 if row == 3 else 2] for row, losses in enumerate(rows["losses"])]
    with pytest.raises(LandscapeError, match=r"Row 3 .*1 losses at 2 step sizes"):
        measured(rows, "gap")
