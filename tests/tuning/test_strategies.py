import math

import pytest

from landscape.tuning.strategies import Configuration, best, candidates, grid, most_groups, run_strategies, sequential

NAN = math.nan
G = {groups: Configuration("ghost", groups=groups) for groups in (1, 2, 4, 8, 16, 32)}


def seq(channel_groups, groups):
    return Configuration("seq", channel_groups, groups)


def ghosts(**runs):
    """Scores such as ``ghosts(g4=[0.9, 0.8])``."""
    return {G[int(name[1:])]: values for name, values in runs.items()}


@pytest.mark.parametrize(
    ("scores", "groups"),
    [
        (ghosts(g2=[0.91, 0.93], g4=[0.95, 0.93], g8=[0.90, 0.94]), 4),
        (ghosts(g2=[0.90, 0.96], g4=[0.92, 0.94], g8=[0.91, 0.95]), 4),  # equal means: the smallest variance
        (ghosts(g2=[0.7, 0.9], g4=[0.9, 0.7]), 2),  # equal in both: the first
        (ghosts(g2=[0.1 + 0.2, 0.3], g4=[0.30, 0.30]), 2),  # 0.1 + 0.2 is not 0.3, but no better either
        (ghosts(g2=[0.94999998807907, 0.96], g4=[0.95, 0.96]), 2),  # float32 and float64 of the same accuracies
        (ghosts(g2=[0.5, 0.5], g4=[0.99, NAN]), 2),  # a diverged run loses
        (ghosts(g2=[0.5, 0.5], g4=[0.99, math.inf]), 2),
        (ghosts(g2=[NAN], g4=[0.1]), 4),
        (ghosts(g8=[0.3]), 8),
        (ghosts(g8=[NAN, NAN], g4=[NAN, 0.9]), None),
        (ghosts(g8=[]), None),
        ({}, None),
    ],
)
def test_the_highest_mean_wins_then_the_smaller_variance(scores, groups):
    assert best(scores) == G.get(groups)


@pytest.mark.parametrize(
    ("tolerance", "groups"), [(0.0, 4), (0.0049, 4), (0.005, 8), (0.0099, 8), (0.01, 16), (0.5, 16)]
)
def test_the_largest_number_of_groups_within_the_tolerance(tolerance, groups):
    scores = ghosts(g2=[0.91, 0.93], g4=[0.94, 0.96], g8=[0.945, 0.945], g16=[0.93, 0.95], g32=[NAN, 0.95])
    assert most_groups(scores, tolerance) == groups


def test_an_equal_mean_with_a_larger_variance_is_within_no_tolerance_at_all():
    assert most_groups(ghosts(g2=[0.95, 0.95], g4=[0.94, 0.96]), 0.0) == 4


def test_just_at_the_tolerance_is_within_it():
    assert 0.9996 - 0.1 > 0.8996  # as floating-point numbers
    assert most_groups(ghosts(g2=[0.9996], g4=[0.8996]), 0.1) == 4


def test_nothing_is_within_the_tolerance_of_nothing():
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
def test_candidates_are_every_combination_that_the_norm_takes(norm, expected):
    assert list(candidates(norm, [1, 8, 1], [2, 4, 2])) == expected


def follow_one(strategy, scores):
    """The choice, and the configurations that were asked for in each round."""
    rounds = []

    def evaluate(configurations):
        rounds.append(list(configurations))
        return {each: scores(each) for each in configurations}

    return run_strategies({"it": strategy}, evaluate)["it"], rounds


def accuracy(each):
    """Best are G_C = 2 and G_M = 4 on SeqNorm, but on GhostNorm G_M = 8 does almost as well as 2."""
    if each.norm == "ghost":
        return {2: [0.9, 0.9], 4: [0.80, 0.90], 8: [0.895, 0.897]}[each.groups]
    return [0.5 + 0.1 * (each.channel_groups == 2) + 0.2 * (each.groups == 4)] * 2


ALL = candidates("seq", [1, 2, 4], [2, 4, 8])


def test_grid_is_the_plain_search():
    choice, rounds = follow_one(grid(ALL), accuracy)
    assert rounds == [list(ALL)]
    assert choice == max(ALL, key=lambda each: sum(accuracy(each))) == seq(2, 4)


def test_sequential_tunes_the_batch_groups_on_ghost_norm_first():
    choice, rounds = follow_one(sequential(ALL, 0.005), accuracy)
    assert rounds == [[G[2], G[4], G[8]], [seq(1, 8), seq(2, 8), seq(4, 8)]]
    assert choice == seq(2, 8)
    assert follow_one(sequential(ALL, 0.001), accuracy)[0] == seq(2, 2)


def test_sequential_needs_as_many_as_the_sum_where_grid_needs_the_product():
    large = candidates("seq", range(1, 11), range(1, 21))
    scores = {"ghost": [0.5], "seq": [0.5]}
    numbers = [
        sum(map(len, follow_one(strategy, lambda each: scores[each.norm])[1]))
        for strategy in (grid(large), sequential(large, 0.0))
    ]
    assert numbers == [10 * 20, 10 + 20]


def test_sequential_tries_only_what_is_possible():
    """Such as where 8 channel groups divide no layer, or one pair does not fit."""
    choice, rounds = follow_one(sequential([seq(1, 2), seq(2, 2), seq(1, 8)], 0.005), accuracy)
    assert rounds == [[G[2], G[8]], [seq(1, 8)]]
    assert choice == seq(1, 8)


@pytest.mark.parametrize("strategy", [grid, sequential])
@pytest.mark.parametrize("norm", ["batch", "ghost", "group"])
def test_a_norm_with_one_option_or_none_is_searched_whole(strategy, norm):
    configurations = candidates(norm, [1, 2], [2, 4])
    choice, rounds = follow_one(strategy(configurations, 0.5), lambda each: [each.groups or each.channel_groups or 1])
    assert rounds == [list(configurations)]
    assert choice == configurations[-1]


def test_where_ghost_norm_diverges_nothing_is_chosen_and_nothing_more_tried():
    choice, rounds = follow_one(sequential(ALL, 0.005), lambda each: [NAN, 0.9])
    assert choice is None
    assert len(rounds) == 1


def test_strategies_side_by_side_share_what_they_ask_for():
    rounds = []

    def evaluate(configurations):
        rounds.append(list(configurations))
        return {each: accuracy(each) for each in configurations}

    ghost = candidates("ghost", [], [2, 4, 8])
    chosen = run_strategies({"seq": sequential(ALL, 0.005), "ghost": sequential(ghost, 0.005)}, evaluate)
    assert chosen == {"seq": seq(2, 8), "ghost": G[2]}
    assert rounds == [[G[2], G[4], G[8]], [seq(1, 8), seq(2, 8), seq(4, 8)]]


def test_configurations_are_written_as_in_figures():
    names = [str(each) for each in (Configuration("batch"), G[4], seq(2, 8))]
    assert names == ["BatchNorm", "GhostNorm (G=4)", "SeqNorm (G_C=2, G_M=8)"]
