"""Statistics compared with scipy's tests, counts of all outcomes, and known sample sizes."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from landscape.analysis.statistics import bootstrap_interval, holm, ratio, seeds_needed, smallest_p, superiority


def groups(n, m, seed=0):
    generator = np.random.default_rng(seed)
    return generator.lognormal(0.5, 0.3, n), generator.lognormal(0, 0.6, m)


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_ratio_paired(n, confidence):
    a, b = groups(n, n)
    test = stats.ttest_rel(np.log(a), np.log(b))
    found = ratio(a, b, paired=True, confidence=confidence)
    ends = np.exp(test.confidence_interval(confidence))
    np.testing.assert_allclose(found[:4], [np.exp(np.log(a / b).mean()), *ends, test.pvalue], rtol=1e-9)
    assert found.method == "paired t"
    assert found.deviation == pytest.approx(np.log(a / b).std(ddof=1))


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (10, 4)])
def test_ratio_welch(n, m):
    a, b = groups(n, m)
    test = stats.ttest_ind(np.log(a), np.log(b), equal_var=False)
    found = ratio(a, b, paired=False)
    center = np.exp(np.log(a).mean() - np.log(b).mean())
    np.testing.assert_allclose(found[:4], [center, *np.exp(test.confidence_interval()), test.pvalue], rtol=1e-9)
    assert found.method == "Welch's t"


def test_ratio_inverse():
    a, b = groups(4, 4)
    for paired in (True, False):
        there, back = ratio(a, b, paired), ratio(b, a, paired)
        np.testing.assert_allclose([1 / there.ratio, 1 / there.high, 1 / there.low], back[:3])
        assert there.p == pytest.approx(back.p)


def test_ratio_one_seed():
    found = ratio(np.array([3.0]), np.array([2.0]), paired=True)
    assert found.ratio == pytest.approx(1.5)
    assert np.isnan([found.low, found.high, found.p, found.deviation]).all()
    assert found.method == "one seed"
    assert ratio(np.array([3.0, 4.0]), np.array([2.0]), paired=False).method == "one seed"


def test_ratio_without_spread():
    ones = np.ones(3)
    assert ratio(ones, ones, paired=True)[:4] == (1, 1, 1, 1)
    assert ratio(4 * ones, 2 * ones, paired=False)[:4] == pytest.approx((2, 2, 2, 0))


@pytest.mark.parametrize("paired", [True, False])
def test_bootstrap_interval(paired):
    """It agrees with the t interval on normal logarithms, whatever the order of the seeds."""
    generator = np.random.default_rng(3)
    a, b = np.exp(generator.normal(0.3, 0.2, 200)), np.exp(generator.normal(0, 0.2, 200))
    low, high = bootstrap_interval(a, b, paired)
    np.testing.assert_allclose([low, high], ratio(a, b, paired)[1:3], rtol=0.01)
    np.testing.assert_allclose(bootstrap_interval(b, a, paired), [1 / high, 1 / low], rtol=0.005)
    order = generator.permutation(200)
    np.testing.assert_allclose(bootstrap_interval(a[order], b[order], paired), [low, high], rtol=0.005)
    assert np.isnan(bootstrap_interval(a[:9], b[:9], paired)).all()
    np.testing.assert_allclose(bootstrap_interval(2 * b, b, paired=True), [2, 2])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_smallest_p_signs(n):
    """Every assignment of signs of differences that all point one way."""
    differences = np.arange(1, n + 1)
    totals = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=n)]
    assert smallest_p(n, n, paired=True) == np.mean(np.array(totals) >= differences.sum())


@pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 3), (1, 4)])
def test_smallest_p_groups(n, m):
    """Every division of separated groups."""
    values = np.array([*range(n), *range(100, 100 + m)])
    gaps = []
    for chosen in combinations(range(n + m), n):
        of = np.isin(range(n + m), chosen)
        gaps.append(values[of].mean() - values[~of].mean())
    assert smallest_p(n, m, paired=False) == pytest.approx(2 * np.mean(np.array(gaps) <= gaps[0]))


def test_superiority():
    a, b = groups(6, 4)
    assert superiority(a, b) == pytest.approx(stats.mannwhitneyu(a, b).statistic / 24)
    assert superiority(np.ones(2), np.ones(3)) == 0.5


def test_holm():
    p = [0.02, np.nan, 0.01, 0.5, 0.04, 0.9]
    found = holm(p)
    # 0.01 * 5, 0.02 * 4, 0.04 * 3, then 0.5 * 2, then at most 1
    np.testing.assert_allclose(found, [0.08, np.nan, 0.05, 1.0, 0.12, 1.0])
    order = [3, 0, 5, 1, 4, 2]
    np.testing.assert_array_equal(holm([p[i] for i in order]), found[order])
    assert holm([]).tolist() == []


@pytest.mark.parametrize(("size", "n"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_textbook(size, n):
    """Sample sizes of the paired t test, as in Cohen's tables and G*Power."""
    assert seeds_needed(np.log(1.2) / size) == n


def test_seeds_needed_limits():
    assert seeds_needed(0.0) == 2
    assert seeds_needed(1e-6) == 2
    assert seeds_needed(np.nan) is None
    assert seeds_needed(100.0) is None


def test_seeds_needed_simulated():
    deviation = 0.2
    n = seeds_needed(deviation)
    drawn = np.random.default_rng(0).normal(np.log(1.2), deviation, (4000, n))
    assert np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05) == pytest.approx(0.83, abs=0.04)
    fewer = stats.ttest_1samp(drawn[:, 1:], 0, axis=1).pvalue
    assert np.mean(fewer < 0.05) < 0.81
