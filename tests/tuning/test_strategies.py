import math

import pytest

from landscape.tuning.strategies import Configuration, best, candidates, grid, most_groups, run_strategy, sequential

NAN = math.nan
G = {groups: Configuration("ghost", groups=groups) for groups in (1, 2, 4, 8, 16, 32)}


def seq(channel_groups, groups):
    return Configuration("seq", channel_groups, groups)


def ghosts(**runs):
    """Return scores by configuration, as in ``ghosts(g4=[0.9, 0.8])``."""
    return {G[int(name[1:])]: values for name, values in runs.items()}


@pytest.mark.parametrize(
    ("scores", "groups"),
    [
        (ghosts(g2=[0.91, 0.93], g4=[0.95, 0.93], g8=[0.90, 0.94]), 4),
        (ghosts(g2=[0.90, 0.96], g4=[0.92, 0.94], g8=[0.91, 0.95]), 4),  # equal means: the smallest variance wins
        (ghosts(g2=[0.7, 0.9], g4=[0.9, 0.7]), 2),  # equal means and variances: the first wins
        (ghosts(g2=[0.1 + 0.2, 0.3], g4=[0.30, 0.30]), 2),  # 0.1 + 0.2 > 0.3 only by rounding
        (ghosts(g2=[0.94999998807907, 0.96], g4=[0.95, 0.96]), 2),  # the same accuracies in float32 and float64
        (ghosts(g2=[0.5, 0.5], g4=[0.99, NAN]), 2),  # a diverged run disqualifies
        (ghosts(g2=[0.5, 0.5], g4=[0.99, math.inf]), 2),
        (ghosts(g2=[NAN], g4=[0.1]), 4),
        (ghosts(g8=[0.3]), 8),
        (ghosts(g8=[NAN, NAN], g4=[NAN, 0.9]), None),
        (ghosts(g8=[]), None),
        ({}, None),
    ],
)
def test_best(scores, groups):
    assert best(scores) == G.get(groups)


@pytest.mark.parametrize(
    ("tolerance", "groups"), [(0.0, 4), (0.0049, 4), (0.005, 8), (0.0099, 8), (0.01, 16), (0.5, 16)]
)
def test_most_groups(tolerance, groups):
    scores = ghosts(g2=[0.91, 0.93], g4=[0.94, 0.96], g8=[0.945, 0.945], g16=[0.93, 0.95], g32=[NAN, 0.95])
    assert most_groups(scores, tolerance) == groups


def test_most_groups_equal_mean_with_zero_tolerance():
    assert most_groups(ghosts(g2=[0.95, 0.95], g4=[0.94, 0.96]), 0.0) == 4


def test_most_groups_exactly_at_tolerance():
    assert 0.9996 - 0.1 > 0.8996  # as floating-point numbers
    assert most_groups(ghosts(g2=[0.9996], g4=[0.8996]), 0.1) == 4


def test_most_groups_all_diverged():
    assert most_groups(ghosts(g2=[NAN]), 0.1) is None


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("batch", [Configuration("batch")]),
        ("ghost", [G[2], G[4]]),
        ("group", [Configuration("group", 1), Configuration("group", 8)]),
        ("seq", [seq(1, 2), seq(1, 4), seq(8, 2), seq(8, 4)]),
    ],
)
def test_candidates(norm, expected):
    assert list(candidates(norm, [1, 8, 1], [2, 4, 2])) == expected


def run(strategy, possible, tolerance, scores):
    """Return the choices by norm, and the configurations that were trained in each round."""
    rounds = []

    def train(configurations):
        rounds.append(list(configurations))
        return {each: scores(each) for each in configurations}

    return run_strategy(strategy, possible, tolerance, train), rounds


def run_one(strategy, configurations, tolerance, scores):
    chosen, rounds = run(strategy, {"it": configurations}, tolerance, scores)
    return chosen["it"], rounds


def accuracy(each):
    """Score SeqNorm best with G_C = 2 and G_M = 4, and GhostNorm with G_M = 2, closely followed by 8."""
    if each.norm == "ghost":
        return {2: [0.9, 0.9], 4: [0.80, 0.90], 8: [0.895, 0.897]}[each.groups]
    return [0.5 + 0.1 * (each.channel_groups == 2) + 0.2 * (each.groups == 4)] * 2


ALL = candidates("seq", [1, 2, 4], [2, 4, 8])


def test_grid():
    choice, rounds = run_one(grid, ALL, 0.0, accuracy)
    assert rounds == [list(ALL)]
    assert choice == max(ALL, key=lambda each: sum(accuracy(each))) == seq(2, 4)


def test_sequential_selects_batch_groups_first():
    choice, rounds = run_one(sequential, ALL, 0.005, accuracy)
    assert rounds == [[G[2], G[4], G[8]], [seq(1, 8), seq(2, 8), seq(4, 8)]]
    assert choice == seq(2, 8)
    assert run_one(sequential, ALL, 0.001, accuracy)[0] == seq(2, 2)


def test_number_of_configurations():
    large = candidates("seq", range(1, 11), range(1, 21))
    scores = {"ghost": [0.5], "seq": [0.5]}
    numbers = [
        sum(map(len, run_one(strategy, large, 0.0, lambda each: scores[each.norm])[1]))
        for strategy in (grid, sequential)
    ]
    assert numbers == [10 * 20, 10 + 20]


def test_sequential_possible_configurations_only():
    choice, rounds = run_one(sequential, [seq(1, 2), seq(2, 2), seq(1, 8)], 0.005, accuracy)
    assert rounds == [[G[2], G[8]], [seq(1, 8)]]
    assert choice == seq(1, 8)


@pytest.mark.parametrize("strategy", [grid, sequential])
@pytest.mark.parametrize("norm", ["batch", "ghost", "group"])
def test_norm_with_at_most_one_option(strategy, norm):
    configurations = candidates(norm, [1, 2], [2, 4])
    choice, rounds = run_one(strategy, configurations, 0.5, lambda each: [each.groups or each.channel_groups or 1])
    assert rounds == [list(configurations)]
    assert choice == configurations[-1]


def test_sequential_ghost_norm_diverges():
    choice, rounds = run_one(sequential, ALL, 0.005, lambda each: [NAN, 0.9])
    assert choice is None
    assert len(rounds) == 1


def test_norms_share_trainings():
    ghost = candidates("ghost", [], [2, 4, 8])
    chosen, rounds = run(sequential, {"seq": ALL, "ghost": ghost}, 0.005, accuracy)
    assert chosen == {"seq": seq(2, 8), "ghost": G[2]}
    assert rounds == [[G[2], G[4], G[8]], [seq(1, 8), seq(2, 8), seq(4, 8)]]


def test_configuration_str():
    names = [str(each) for each in (Configuration("batch"), G[4], seq(2, 8))]
    assert names == ["BatchNorm", "GhostNorm (G=4)", "SeqNorm (G_C=2, G_M=8)"]
