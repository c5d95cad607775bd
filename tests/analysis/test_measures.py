"""Measures compared with closed forms and with a loop over rows."""

import numpy as np
import pandas as pd
import pytest
from recordings import frame, uphill, without

from landscape.analysis.measures import has_inputs, measured
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
            "lr": np.mean(step_sizes),
            "slope": gradient @ d,
            "direction_norm": np.linalg.norm(d),
            "step_sizes": step_sizes,
            "losses": [loss(point) for point in there],
            "gradient_distances": [np.linalg.norm(hessian @ point + b - gradient) for point in there],
            "gradient_cosines": [cosine(hessian @ point + b, gradient) for point in there],
        }
        rows.append(row)
        truths.append((hessian, d))
    return pd.DataFrame(rows), truths


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step_sizes", [[0.1, 0.2, 0.4], [0.3], [-0.5, 0.25, 1.0], [-0.2, -0.1]])
def test_measured_quadratic(step_sizes):
    rows, truths = quadratic_rows(step_sizes)
    ahead = [eta for eta in step_sizes if eta >= 0] or step_sizes
    smallest, largest = np.min(np.abs(ahead)), np.max(np.abs(ahead))
    for measure in MEASURES:
        if measure != "sam_sharpness" or min(step_sizes) < 0:
            rows = measured(rows, measure)
    for row, (hessian, d) in zip(rows.itertuples(), truths, strict=True):
        change, bend = np.linalg.norm(hessian @ d), d @ hessian @ d
        close([row.predictiveness_min, row.predictiveness_max], [smallest * change, largest * change])
        close([row.beta, row.beta_min, row.beta_max], change / np.linalg.norm(d))
        close([row.gap_min, row.gap_max], np.sort([smallest**2 * bend / 2, largest**2 * bend / 2]))
        close([row.curvature_min, row.curvature_max], bend / (d @ d))
        losses = [loss for eta, loss in zip(step_sizes, row.losses, strict=True) if eta in ahead]
        assert (row.loss_min, row.loss_max) == (min(losses), max(losses))
        assert row.range == max(losses) - min(losses)
        close(row.batch_sharpness, bend / (d @ d))
        if len(ahead) > 1:
            close(row.misfit, 0)
            close(row.relative_range, row.range / np.ptp(ahead) / abs(row.slope))
        if min(step_sizes) < 0:
            back = -min(step_sizes)
            close(row.sam_sharpness, back * row.slope + back**2 * bend / 2)
        if max(step_sizes) > 0:
            check_steps(row, bend, max(step_sizes))


def check_steps(row, bend, largest):
    """Compare step sizes on ``L - eta s + eta^2 bend / 2`` with their closed forms."""
    if row.lr > 0:
        close(row.sharpness, bend / row.direction_norm**2)
        close(row.lost_share, row.lr * bend / 2 / row.slope)
    ends = [0.0, largest] if bend <= 0 else [0.0, largest, np.clip(row.slope / bend, 0, largest)]
    best = min(ends, key=lambda eta: -eta * row.slope + eta**2 * bend / 2)
    close([row.optimal_step, row.optimal_step_inside], [best, best < largest])
    crossing = 0.0 if row.slope < 0 else 2 * row.slope / bend if bend > 0 else INF
    close([row.critical_step, row.critical_step_inside], [min(crossing, largest), crossing <= largest])
    if row.critical_step > 0:
        close(row.critical_sharpness, 2 / row.critical_step)


@pytest.mark.parametrize("step_sizes", [[0.3, 0.7], [0.2, 0.5, 1.0], [-0.5, 0.5, 1.0], [1.0, -1.0, -2.0]])
@pytest.mark.parametrize("third", [-4.0, 1.5, 9.0])
def test_measured_cubic(step_sizes, third):
    """The curve is exact on ``1 - 2 eta + 3 eta^2 / 2 + third eta^3 / 6``."""

    def loss(eta):
        return 1 - 2 * eta + 1.5 * eta**2 + third / 6 * eta**3

    row = {"loss": 1.0, "lr": 0.4, "slope": 2.0, "direction_norm": 2.0, "step_sizes": step_sizes}
    rows = pd.DataFrame([row | {"losses": [loss(eta) for eta in step_sizes]}])
    for measure in ALONG:
        rows = measured(rows, measure)
    (found,) = rows.itertuples()
    close(found.batch_sharpness, 3 / 4)
    close(found.sharpness, 2 * (1.5 + third / 6 * 0.4) / 4)
    close(found.lost_share, (1.5 * 0.4**2 + third / 6 * 0.4**3) / 0.8)
    largest = max(step_sizes)
    flat, back = (
        [x.real for x in np.roots(of) if abs(x.imag) < 1e-12 and 0 < x.real <= largest]
        for of in ([third / 2, 3, -2], [third / 6, 1.5, -2])
    )
    close(found.optimal_step, min([*flat, largest], key=loss))
    assert found.optimal_step_inside == (found.optimal_step < largest)
    close(found.critical_step, min([*back, largest]))
    assert found.critical_step_inside == bool(back)


@pytest.mark.parametrize("slope", [2.0, -7.0, NAN])
def test_two_sided_curvature(slope):
    """Between opposite points the slope cancels, so that batch sharpness is the second difference."""

    def loss(eta):
        return 1 - 2 * eta + 1.5 * eta**2 + 0.7 * eta**3 + 0.2 * eta**4

    row = {"loss": 1.0, "slope": slope, "direction_norm": 2.0, "step_sizes": [-0.5, -0.1, 0.1, 0.4]}
    rows = pd.DataFrame([row | {"losses": [loss(eta) for eta in row["step_sizes"]]}])
    expected = (loss(0.1) - 2 + loss(-0.1)) / (0.1 * 2) ** 2
    if np.isfinite(slope):
        close(measured(rows, "batch_sharpness")["batch_sharpness"], expected)
    close(measured(rows, "sam_sharpness")["sam_sharpness"], loss(-0.5) - 1)


def test_band_of_descent():
    """Uphill points neither widen a band nor change a measure of it, also where they are not finite."""
    ahead, _ = quadratic_rows([0.1, 0.4])
    both = ahead.assign(step_sizes=[[-3.0, 0.1, 0.4]] * len(ahead), losses=[[INF, *row] for row in ahead["losses"]])
    both["gradient_distances"] = [[99.0, *row] for row in both["gradient_distances"]]
    both["gradient_cosines"] = [[-1.0, *row] for row in both["gradient_cosines"]]
    for measure in ("loss", "predictiveness", "beta", "gap", "curvature", "range", "relative_range", "lipschitz"):
        ends = [f"{measure}_min", f"{measure}_max"]
        pd.testing.assert_frame_equal(measured(both, measure)[ends], measured(ahead, measure)[ends])
    assert measured(both, "sam_sharpness")["sam_sharpness"].isna().all()


def test_sam_sharpness_needs_negative_step_sizes():
    rows = pd.concat([quadratic_rows([0.1, 0.4], updates=2)[0], quadratic_rows([-0.1, 0.4], updates=2)[0]])
    assert list(has_inputs(rows, "sam_sharpness")) == [False, False, True, True]
    assert list(measured(rows, "sam_sharpness")["sam_sharpness"].isna()) == [True, True, False, False]
    with pytest.raises(LandscapeError, match=r"sam_sharpness.* requires negative step sizes.*--step-sizes=-"):
        measured(rows[:2], "sam_sharpness")


def test_critical_step_censored():
    rows = pd.DataFrame({"loss": 1.0, "slope": [1.0, 1.0, NAN], "step_sizes": [[0.5, 1.0]] * 3})
    rows["losses"] = [[0.6, 0.5], [0.8, 1.2], [0.6, 0.5]]
    found = measured(rows, "critical_step")
    assert list(found["critical_step_inside"].astype(object)) == [False, True, pd.NA]
    assert found["critical_step"][0] == 1.0
    assert 0.5 < found["critical_step"][1] < 1.0


def test_critical_step_at_a_point():
    """A loss that is back exactly at a recorded point is found in spite of rounding."""
    generator = np.random.default_rng(0)
    loss, slope, last = generator.uniform(0.1, 3, (3, 200))
    first = loss - slope * last / 3
    rows = pd.DataFrame({"loss": loss, "slope": slope})
    rows["step_sizes"], rows["losses"] = list(np.stack([last / 2, last], 1)), list(np.stack([first, loss], 1))
    found = measured(rows, "critical_step")
    close(found["critical_step"], last)
    assert found["critical_step_inside"].all()


def test_lost_share_beyond_step_sizes():
    run = frame(steps=3).assign(lr=[0.0, 0.4, 0.5])  # the largest step size is 0.4
    assert list(measured(run, "lost_share")["lost_share"].isna()) == [True, False, True]


def test_batch_sharpness_hessian_product():
    """The limit is that of a Hessian-vector product on a trained network, the secant is near it."""
    torch = pytest.importorskip("torch")
    from landscape.probe.landscape_probe import LandscapeProbe

    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,))
    layers = [torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Tanh(), torch.nn.Linear(12, 3)]
    model = torch.nn.Sequential(*layers).double()
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.2), torch.nn.CrossEntropyLoss()
    expected = []
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[2e-4, 5e-4, 0.2], gradients=True) as probe:
        for _ in range(12):
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward(retain_graph=True)
            parameters = list(model.parameters())
            gradient = torch.autograd.grad(loss, parameters, create_graph=True)
            norm = sum((part.detach() ** 2).sum() for part in gradient)
            product = torch.autograd.grad(gradient, parameters, [part.detach() for part in gradient])
            bend = sum((part.detach() * of).sum() for part, of in zip(gradient, product, strict=True))
            expected.append((bend / norm).item())
            optimizer.step()
        rows = probe.frame()
    found = measured(rows, "batch_sharpness")["batch_sharpness"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    secant = measured(rows, "sharpness")["sharpness"]
    exact = [2 * gap / (0.2 * d) ** 2 for gap, d in zip(_gaps(rows), rows["direction_norm"], strict=True)]
    np.testing.assert_allclose(secant, exact, rtol=1e-9)
    assert (measured(rows, "cosine")["cosine_max"] > 0.999).all()


def _gaps(rows):
    """Return the gap at the last step size."""
    points = zip(rows["losses"], rows["step_sizes"], rows["loss"], rows["slope"], strict=True)
    return [losses[-1] - loss + steps[-1] * slope for losses, steps, loss, slope in points]


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
        lists = [row[name] for name in ("step_sizes", "losses", "gradient_distances", "gradient_cosines")]
        if any(values is None for values in lists) or len(lists[0]) == 0:
            extremes.append((NAN, NAN))
            continue
        eta, losses, distances, cosines = map(np.array, lists)
        with np.errstate(all="ignore"):
            gap = losses - (row["loss"] - eta * row["slope"])
            if measure in TWO_SIDED:
                extremes.append([TWO_SIDED[measure](row, measure, eta, gap)] * 2)
                continue
        ahead = eta >= 0 if (eta >= 0).any() else eta < 0
        eta, losses, distances, cosines, gap = (of[ahead] for of in (eta, losses, distances, cosines, gap))
        with np.errstate(all="ignore"):
            moved = np.abs(eta) * row["direction_norm"]
            values = {
                "loss": losses,
                "predictiveness": distances,
                "beta": [np.max((distances / moved)[eta != 0])],
                "gap": gap,
                "curvature": (2 * gap / moved**2)[eta != 0],
                "range": [losses.max() - losses.min()],
                "relative_range": [(losses.max() - losses.min()) / np.ptp(eta) / abs(row["slope"])],
                "lipschitz": [steepest_chord(row, eta, losses)],
                "misfit": [misfit(eta, gap, losses)],
                "cosine": cosines,
            }[measure]
        extremes.append((np.min(values), np.max(values)))
    return np.array(extremes)


ALONG = ("lost_share", "sharpness", "batch_sharpness", "optimal_step", "critical_step", "critical_sharpness")


def along_curve(row, measure, eta, gap):
    """Read the measure at a million points of the interpolated curve."""
    if not np.isfinite([row["loss"], row["slope"], *gap]).all():
        return NAN
    eta, place = np.unique(eta, return_index=True)
    gap, eta = gap[place][eta != 0], eta[eta != 0]
    q, n = gap / eta**2, row["direction_norm"] ** 2
    at_zero = q[0] if len(eta) == 1 else None
    if at_zero is None:
        first = min(max(int((eta < 0).sum()) - 1, 0), len(eta) - 2)
        at_zero = np.polyval(np.polyfit(eta[first : first + 2], q[first : first + 2], 1), 0)
    if measure == "batch_sharpness":
        return 2 * at_zero / n
    knots, values = [0, *eta[eta > 0]], [at_zero, *q[eta > 0]]
    if measure in ("lost_share", "sharpness"):
        there = np.interp(row["lr"], knots, values, right=NAN) if len(knots) > 1 else NAN
        return there * row["lr"] / row["slope"] if measure == "lost_share" else 2 * there / n
    if len(knots) == 1:
        return NAN
    fine = np.union1d(np.linspace(0, knots[-1], 1_000_001), knots)
    change = -row["slope"] * fine + fine**2 * np.interp(fine, knots, values)
    if measure == "optimal_step":
        return fine[np.argmin(change)]
    back = fine[1:][change[1:] >= 0]
    step = 0.0 if row["slope"] <= 0 else back[0] if len(back) else knots[-1]
    return step if measure == "critical_step" else np.divide(2, step)


def uphill_rise(row, measure, eta, gap):
    rise = gap[np.argmin(eta)] - np.min(eta) * row["slope"]
    return rise if np.min(eta) < 0 and np.isfinite(rise) else NAN


TWO_SIDED = dict.fromkeys(ALONG, along_curve) | {"sam_sharpness": uphill_rise}


def steepest_chord(row, eta, losses):
    points = [(0, row["loss"]), *zip(eta, losses, strict=True)]
    chords = [abs(f - e) / abs(a - b) for a, e in points for b, f in points if a != b]
    return max(chords) / row["direction_norm"] if np.isfinite([*losses, row["loss"]]).all() else NAN


def misfit(eta, gap, losses):
    if (eta != 0).sum() < 2 or not np.isfinite(gap).all():
        return NAN
    best = np.linalg.lstsq(eta[:, None] ** 2, gap, rcond=None)[0][0]
    return np.sqrt(np.mean((gap - best * eta**2) ** 2)) / np.ptp(losses)


LISTS = ("step_sizes", "losses", "gradient_distances", "gradient_cosines")
EDGE_CASES = pd.DataFrame(
    [
        ([0.1, 0.2], [1.0, 2.0], [3.0, 4.0], [0.5, -0.5], 1.5, 1.0, 1.0, 0.2),
        ([0.1], [1.0], [3.0], [0.5], 1.5, 1.0, 2.0, 0.05),
        (None, None, None, None, 1.5, 1.0, 2.0, 0.1),
        ([0.1, 0.2], None, None, None, 1.5, 1.0, 2.0, 0.1),
        ([0.1, 0.0, 0.3], [1.0, NAN, 2.0], [3.0, 4.0, 5.0], [0.1, 0.2, 0.3], 1.5, 1.0, 2.0, 0.1),
        ([0.1, 0.2, 0.3], [1.0, INF, 2.0], [NAN, 4.0, INF], [0.1, NAN, 0.3], 1.5, 1.0, 2.0, 0.1),
        ([], [], [], [], 1.5, 1.0, 2.0, 0.1),
        ([0.1, 0.2], [INF, -INF], [INF, INF], [1.0, 1.0], INF, 1.0, 2.0, 0.1),
        ([0.1, 0.2], [1.0, 2.0], [0.0, 4.0], [1.0, 1.0], 1.5, 1.0, 0.0, 0.1),
        ([0.1, 0.2], [1.0, 2.0], [0.0, 4.0], [1.0, 1.0], 1.5, NAN, NAN, 0.1),
        ([0.5, 0.25], [-1.0, 2.0], [0.0, 4.0], [1.0, 1.0], 1.5, -1.0, 3.0, 0.3),
        ([0.3, 0.1, 0.2, 0.1], [1.6, 1.2, 0.9, 1.2], [1.0] * 4, [1.0] * 4, 1.5, 2.0, 3.0, 0.25),
        ([-0.1, 0.0, 0.2, 0.4], [1.8, 1.5, 1.1, 1.3], [1.0] * 4, [1.0] * 4, 1.5, 2.0, 3.0, 0.4),
        ([-0.2, -0.1], [1.8, 1.5], [1.0] * 2, [1.0] * 2, 1.5, 2.0, 3.0, 0.1),
        ([0.1, 0.2, 0.3], [1.4, 1.7, 1.2], [1.0] * 3, [1.0] * 3, 1.5, 2.0, 3.0, 0.5),
    ],
    columns=[*LISTS, "loss", "slope", "direction_norm", "lr"],
)


@pytest.mark.parametrize("kind", ["object", "arrow", "arrays"])
@pytest.mark.parametrize("measure", MEASURES)
def test_measured_row_by_row(measure, kind):
    rows = EDGE_CASES.copy()
    for name in LISTS:
        if kind == "arrow":
            rows[name] = rows[name].astype(frame(steps=1)[name].dtype)
        elif kind == "arrays":
            rows[name] = pd.Series([None if v is None else np.array(v) for v in EDGE_CASES[name]], dtype=object)
    found = measured(rows, measure)[[f"{measure}_min", f"{measure}_max"]].to_numpy()
    expected = row_by_row(EDGE_CASES, measure)
    assert np.isnan(expected).any()
    assert np.isfinite(expected).any()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    by_search = measure in ("optimal_step", "critical_step", "critical_sharpness")
    np.testing.assert_allclose(found, expected, rtol=1e-5 if by_search else 1e-9, atol=1e-6 if by_search else 1e-12)


def test_measured_keeps_index():
    rows = uphill(pd.concat([frame(steps=9), frame(steps=4, seed=1)]))  # an index with duplicates
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
    with pytest.raises(LandscapeError, match=r"measure='width': .*loss, predictiveness, beta"):
        measured(frame(steps=2), "width")


def test_measured_wrong_count():
    rows = quadratic_rows([0.1, 0.2])[0]
    rows["losses"] = [losses[: 1 if row == 3 else 2] for row, losses in enumerate(rows["losses"])]
    with pytest.raises(LandscapeError, match=r"Row 3 .*1 losses at 2 step sizes"):
        measured(rows, "gap")
