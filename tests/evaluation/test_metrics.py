import math

import numpy as np
import pytest

from nt_utils.errors import InputError
from nt_utils.evaluation import metrics


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    # The figures that statsmodels' proportion_confint(method="wilson") gives.
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (10, 10, 0.7224672, 1.0), (90, 100, 0.8256343, 0.9447708)],
)
def test_wilson(count, n, low, high):
    interval = metrics.wilson(count, n)
    assert interval.value == count / n and interval.n == n
    assert interval.low == pytest.approx(low, abs=1e-6) and interval.high == pytest.approx(high, abs=1e-6)


def test_wilson_without_observations_and_with_bad_counts():
    assert all(math.isnan(x) for x in metrics.wilson(0, 0)[:3])
    with pytest.raises(InputError, match="count must lie between 0 and n = 3, got 4"):
        metrics.wilson(4, 3)
    with pytest.raises(InputError, match="level must lie between 0 and 1"):
        metrics.wilson(1, 3, level=95)


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(0)
    hard = rng.random(200) < 0.5
    before, after = hard.astype(float), (hard | (rng.random(200) < 0.1)).astype(float)
    change = metrics.paired_difference(before, after, seed=1)
    assert change.value == pytest.approx((after - before).mean()) and change.n == 200
    assert 0 < change.low < change.value < change.high
    shuffled = metrics.paired_difference(before, rng.permutation(after), seed=1)
    assert (shuffled.high - shuffled.low) > 1.5 * (change.high - change.low)
    assert metrics.paired_difference(before, after, seed=1) == change


def test_paired_difference_leaves_out_what_was_not_judged():
    change = metrics.paired_difference([0.0, math.nan, 1.0], [1.0, 1.0, math.nan])
    assert (change.value, change.high, change.n) == (1.0, 1.0, 1)
    assert metrics.paired_difference([math.nan], [1.0]).n == 0
    with pytest.raises(InputError, match="got 1 and 2"):
        metrics.paired_difference([1.0], [1.0, 0.0])


def test_paired_bootstrap_covers():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        change = metrics.bootstrap_mean(rng.normal(0.3, 1.0, 60), seed=trial, draws=400)
        hits += change.low <= 0.3 <= change.high
    assert 0.88 <= hits / 200 <= 0.99


def test_t_interval_over_seeds():
    interval = metrics.t_interval([1.0, 2.0, 3.0])
    assert interval.value == 2.0 and interval.n == 3
    assert interval.high - interval.value == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert math.isnan(metrics.t_interval([1.0]).low) and metrics.t_interval([1.0, math.nan]).n == 1


def test_holm():
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = metrics.holm([0.02, math.nan, 0.9])
    assert adjusted[0] == pytest.approx(0.04) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.9)


def test_sign_flip_p_value_agrees_with_the_exact_test():
    before, after = [0.0] * 8, [1.0] * 7 + [-1.0]
    exact = (2 * 9) / 2**8  # sums of at least 6 in size: 8 or 6 of either sign
    assert metrics.sign_flip_p_value(before, after, draws=40_000) == pytest.approx(exact, abs=0.005)
    assert metrics.sign_flip_p_value([0, 1, 0], [0, 1, 0]) == 1.0


def test_cohen_kappa():
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    kappa = metrics.cohen_kappa(first, second)  # the textbook example: 0.4
    assert kappa.value == pytest.approx(0.4) and kappa.low < 0.4 < kappa.high and kappa.n == 50
    assert metrics.cohen_kappa(first, first).value == 1.0
    assert metrics.cohen_kappa([*first, None], [*second, "yes"]).n == 50
    assert math.isnan(metrics.cohen_kappa(["a", "a"], ["a", "a"]).value)


def test_confusion_keeps_what_was_not_judged():
    table = metrics.confusion(["a", "b", math.nan], ["a", "a", "b"])
    assert table.loc["b", "a"] == 1 and table.loc["not judged", "b"] == 1 and table.to_numpy().sum() == 3


def test_a_difference_without_spread_keeps_an_interval():
    same = metrics.paired_difference([0] * 30, [0] * 30)
    assert same == (0.0, -0.1, 0.1, 30)
    assert metrics.paired_difference([0] * 30, [1] * 30) == (1.0, 0.9, 1.0, 30)
    spread = metrics.paired_difference([0, 1] * 15, [1, 1] * 15)
    assert spread.low < spread.value < spread.high


def test_clustered_difference_counts_topics_and_draws_not_prompts():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(20), 10)
    after = (rng.random(20) < 0.5)[clusters].astype(float)  # every topic is all or nothing
    plain = metrics.clustered_difference(np.zeros(200), after, np.arange(200))
    topics = metrics.clustered_difference(np.zeros(200), after, clusters)
    assert plain.value == topics.value == after.mean()
    assert topics.high - topics.low > 2 * (plain.high - plain.low)
    assert (
        abs(
            (plain.high - plain.low)
            / (metrics.wilson(int(after.sum()), 200).high - metrics.wilson(int(after.sum()), 200).low)
            - 1
        )
        < 0.1
    )
    draws = np.zeros((5, 200))
    draws[4] = 1.0
    uncertain = metrics.clustered_difference(draws, np.full(200, 0.5), np.arange(200))
    assert uncertain.value == pytest.approx(0.3)
    assert uncertain.high - uncertain.low > 0.5, "one of five draws decides: the interval must say so"
    assert metrics.clustered_difference([0, 0, 1], [1, float("nan"), 1], [0, 1, 2]).n == 2
    assert metrics.clustered_difference([0] * 30, [0] * 30, range(30)) == (0.0, -0.1, 0.1, 30)
