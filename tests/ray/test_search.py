"""The search for the critical step, on losses whose critical step is known."""

import math

import numpy as np
import pandas as pd
import pytest

from landscape.analysis.measures import measured
from landscape.ray.critical import MOST, WIDTH, search


def found(loss_at, slope, step_sizes):
    """Return the points of a search, and the row that they make."""
    points = [(eta, loss_at(eta)) for eta in step_sizes]
    more = search(loss_at, loss_at(0.0), slope, points)
    row = {"loss": loss_at(0.0), "slope": slope, "step_sizes": step_sizes, "losses": [loss for _, loss in points]}
    lists = {"critical_step_sizes": [eta for eta, _ in more], "critical_losses": [loss for _, loss in more]}
    return more, measured(pd.DataFrame([row | lists]), "critical_step").iloc[0]


@pytest.mark.parametrize("step_sizes", [[0.5, 1.0], [0.01], [30.0], [-0.3], [-0.3, 0.0, 0.4]])
@pytest.mark.parametrize("bend", [0.2, 1.0, 7.0])
def test_quadratic(bend, step_sizes):
    """The loss ``3 - 2 eta + bend eta^2 / 2`` is back at ``4 / bend``."""
    more, row = found(lambda eta: 3 - 2 * eta + bend * eta**2 / 2, 2.0, step_sizes)
    assert len(more) <= MOST
    assert row["critical_step_inside"]
    assert row["critical_step"] == pytest.approx(4 / bend, rel=1e-9)


@pytest.mark.parametrize("third", [-1.0, 0.3, 20.0])
@pytest.mark.parametrize("step_sizes", [[0.05, 0.1], [0.1], [8.0]])
def test_cubic(third, step_sizes):
    more, row = found(lambda eta: 3 - 2 * eta + 2 * eta**2 + third * eta**3 / 6, 2.0, step_sizes)
    roots = np.roots([third / 6, 2, -2])
    expected = min(root.real for root in roots if abs(root.imag) < 1e-12 and root.real > 0)
    assert len(more) <= MOST
    assert row["critical_step"] == pytest.approx(expected, rel=1e-6)


def bracket(loss_at, slope, points):
    """Return the last step below the start before the first one that is not."""
    points = sorted([*points, *search(loss_at, loss_at(0), slope, points)])
    high = min(eta for eta, loss in points if not loss < loss_at(0))
    return max(eta for eta, _ in points if eta < high), high


def test_bracket_is_narrow():
    low, high = bracket(lambda eta: math.cosh(eta - 1), math.sinh(1), [(0.5, math.cosh(0.5))])
    assert low < 2 <= high <= low / (1 - WIDTH)


def test_bracket_of_a_loss_that_is_no_polynomial():
    """It has a kink, and beyond the critical step its values are useless."""
    low, high = bracket(lambda eta: 1 - eta if eta < 5 else math.inf if eta > 6 else eta - 4, 1.0, [(2.0, -1.0)])
    assert low < 5 <= high < 1.5 * low


def test_censored():
    """A loss that never is back has a bound, the largest step that was tried."""
    more, row = found(lambda eta: -eta, 1.0, [0.1, 0.2])
    assert len(more) == MOST
    assert not row["critical_step_inside"]
    assert row["critical_step"] == max(eta for eta, _ in more) > 32 * 0.2


@pytest.mark.parametrize(
    ("loss", "slope", "points"),
    [
        (1.0, -1.0, [(0.1, 1.2)]),
        (1.0, 0.0, [(0.1, 1.2)]),
        (math.nan, 1.0, [(0.1, 0.9)]),
        (1.0, 1.0, [(0.1, math.nan)]),
        (1.0, 1.0, [(0.98, 0.99), (1.0, 1.0)]),
        (1.0, 1.0, [(0.0, 1.0)]),
    ],
)
def test_nothing_to_search(loss, slope, points):
    assert search(lambda eta: pytest.fail("evaluated"), loss, slope, points) == []


def test_limit():
    assert all(eta <= 3 for eta, _ in search(lambda eta: -eta, 0.0, 1.0, [(1.0, -1.0)], limit=3.0))


def test_points_of_the_search_are_read_by_two_measures_only():
    rows = pd.DataFrame({"loss": 1.0, "slope": 1.0, "step_sizes": [[0.5]] * 3, "losses": [[0.75]] * 3})
    rows["critical_step_sizes"] = [[2.0, 0.9], None, []]
    rows["critical_losses"] = [[math.inf, 0.91], None, []]
    assert list(measured(rows, "critical_step")["critical_step"]) == [0.9, 0.5, 0.5]
    assert list(measured(rows, "critical_sharpness")["critical_sharpness"]) == [2 / 0.9, 4.0, 4.0]
    assert list(measured(rows, "optimal_step")["optimal_step"]) == [0.5] * 3
    assert list(measured(rows, "range")["range"]) == [0.0] * 3
