import copy
import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from nt_utils.evaluation import metrics
from nt_utils.experiments.bench import total
from tests.common import refused


@pytest.mark.parametrize(("count", "n"), [(0, 10), (5, 10), (10, 10), (90, 100), (1, 450)])
def test_wilson_equals_scipys(count, n):
    wanted = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert metrics.wilson(count, n) == pytest.approx((count / n, wanted.low, wanted.high, n))
    assert metrics.rate([1] * count + [0] * (n - count)) == metrics.wilson(count, n)


def test_wilson_without_observations_and_with_bad_counts():
    assert all(math.isnan(x) for x in metrics.wilson(0, 0)[:3]) and metrics.rate([math.nan]).n == 0
    refused("count must lie between 0 and n = 3, got 4", lambda: metrics.wilson(4, 3))
    refused("level must lie between 0 and 1", lambda: metrics.wilson(1, 3, level=95))


def test_never_seen_counts_clusters_and_not_prompts():
    """A kind of event that hits whole topics was looked for 26 times, not 208 times."""
    topics = np.repeat(np.arange(26), 8)
    zeros = np.zeros(208)
    assert metrics.rate(zeros, topics).high == pytest.approx(metrics.wilson(0, 26).high)
    assert metrics.clustered_difference(zeros, zeros, topics) == pytest.approx((0, -3 / 26, 3 / 26, 208))
    assert metrics.clustered_difference(zeros, zeros).high == pytest.approx(3 / 208)
    assert metrics.clustered_difference(zeros, zeros + 1, topics) == pytest.approx((1, 1 - 3 / 26, 1, 208))
    draws = np.tile(np.arange(8)[:, None] / 8, (1, 208))
    wide = metrics.clustered_difference(draws, zeros + 1, topics)
    assert wide.low < wide.value - 3 / 26, "draws that differ add to it"


def test_t_interval_and_mean_equal_scipys():
    values = np.array([1.0, 2.0, 4.0, math.nan])
    wanted = stats.ttest_1samp(values[:3], 0).confidence_interval()
    assert metrics.t_interval(values) == pytest.approx((7 / 3, wanted.low, wanted.high, 3))
    assert metrics.mean(np.repeat(values, 5), np.repeat(range(4), 5)) == pytest.approx((7 / 3, *wanted, 15))
    alone = metrics.t_interval([3.0])
    assert alone.value == 3.0 and math.isnan(alone.low) and alone.n == 1 and metrics.t_interval([]).n == 0


def test_a_single_control_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 40))
    wanted = stats.ttest_rel(after, before).confidence_interval()
    assert metrics.clustered_difference(before, after) == pytest.approx((np.mean(after - before), *wanted, 40))
    holes = after.copy()
    holes[3] = math.nan
    assert metrics.clustered_difference(before, holes).n == 39
    assert metrics.clustered_difference([math.nan], [1.0]).n == 0
    refused("got 1 and 2", lambda: metrics.clustered_difference([1.0], [1.0, 0.0]))


def test_seeds_that_agree_by_chance_are_no_surer_than_each_of_them():
    each = [metrics.Interval(0.0, -0.2, 0.2, 20)] * 3
    pooled = metrics.pooled(each)
    assert pooled.low == pytest.approx(-stats.t.ppf(0.975, 2) * 0.2 / stats.norm.ppf(0.975) / 3**0.5) and pooled.n == 3
    wide = metrics.pooled([metrics.Interval(x, x - 0.01, x + 0.01, 20) for x in (0.1, 0.2, 0.6)])
    assert wide.low == pytest.approx(stats.t.interval(0.95, 2, 0.3, stats.sem([0.1, 0.2, 0.6]))[0])


def test_an_interpolated_rate_is_no_surer_than_an_evaluated_one():
    between, evaluated = metrics.Interval(0.3, 0.29, 0.31, 40), metrics.Interval(0.25, 0.15, 0.6, 40)
    assert between.as_wide_as(evaluated) == pytest.approx((0.3, 0.2, 0.65, 40))
    assert evaluated.as_wide_as(between) == pytest.approx(evaluated)
    assert metrics.Interval(0.9, 0.9, 0.9, 4).as_wide_as(evaluated).high == 1
    assert metrics.Interval(0.05, -0.1, 0.2, 9).within(0, 1) == (0.05, 0, 0.2, 9)


def test_ratio_of_equal_lengths_is_the_mean():
    values = np.array([2.0, 3.0, 7.0, 4.0])
    found, wanted = metrics.ratio(values * 10, np.full(4, 10.0)), metrics.mean(values)
    assert found == pytest.approx(wanted)
    assert metrics.ratio([], []).n == 0


# --------------------------------------------------------------------------------------------------------- coverage


TOPICS = np.repeat(np.arange(26), 8)
#: Mean rate where topics' logits spread by 1.5 around -2; between draws' logits by 1 around 0.
TOPIC_RATE = stats.norm.expect(lambda x: expit(-2 + 1.5 * x))
WIDE = math.sqrt(2)
CHANGE = stats.norm.expect(lambda x: expit(WIDE * x)) - stats.norm.expect(lambda x: expit(WIDE * x - 1))
TRAINED = stats.norm.expect(lambda x: expit(1.25**0.5 * x)) - stats.norm.expect(lambda x: expit(1.25**0.5 * x - 1))
EXCESS = stats.norm.expect(lambda x: expit(1 + x)) - stats.norm.expect(lambda x: expit(WIDE * x - 1))


def prompts_in_topics(rng):
    chance = expit(-2 + 1.5 * rng.normal(size=26))[TOPICS]
    return metrics.rate(rng.random(208) < chance, TOPICS), TOPIC_RATE


def change_in_topics(rng):
    topic = rng.normal(size=26)[TOPICS]
    before, after = (rng.random(208) < expit(shift + topic + rng.normal(size=26)[TOPICS]) for shift in (-1, 0))
    return metrics.clustered_difference(before, after, TOPICS), CHANGE


def control_draws(rng, draws):
    """Random controls whose logits spread by 1 between draws, on prompts in topics; the chosen set raises the rate."""
    topic = rng.normal(size=26)[TOPICS]
    controls = rng.random((draws, 208)) < expit(-1 + rng.normal(size=(draws, 1)) + topic)
    after = rng.random(208) < expit(1 + topic)
    return metrics.clustered_difference(controls, after, TOPICS), EXCESS


def trainings_on_both_sides(rng):
    """Three trainings of each arm, whose logits spread by .5 between trainings."""
    topic = rng.normal(size=26)[TOPICS]
    before, after = (rng.random((3, 208)) < expit(shift + 0.5 * rng.normal(size=(3, 1)) + topic) for shift in (-1, 0))
    found, other = (
        metrics.clustered_difference(before, after, TOPICS),
        metrics.clustered_difference(after, before, TOPICS),
    )
    assert (found.value, found.low) == pytest.approx((-other.value, -other.high))
    return found, TRAINED


def seeds_that_hardly_differ(rng):
    """Three seeds whose rates differ by chance alone: the spread between them is often next to nothing."""
    return metrics.pooled([metrics.rate(rng.random(60) < 0.3) for _ in range(3)]), 0.3


def requests_asked_twice(rng):
    """The mean of two rates, of the same 60 requests asked directly and under an attack."""
    leaning = 2 * rng.normal(size=60)
    both = [metrics.rate(rng.random(60) < expit(leaning + shift)) for shift in (-1, 1)]
    value, low, high, n = total(*both, together=True)
    return metrics.Interval(value / 2, low / 2, high / 2, n), 0.5


def perplexity_of_texts(rng):
    tokens = rng.integers(60, 200, 16)
    return metrics.ratio(tokens * rng.normal(2.0, 0.4, 16), tokens), 2.0


#: Kind of study -> its interval, from a generator, and the truth.
STUDIES = {
    "prompts alone": lambda rng: (metrics.rate(rng.random(60) < 0.12), 0.12),
    "prompts in topics": prompts_in_topics,
    "rate of rare topics": lambda rng: (metrics.rate((rng.random(26) < 0.05)[TOPICS], TOPICS), 0.05),
    "rare topic event": lambda rng: (
        metrics.clustered_difference(np.zeros(208), (rng.random(26) < 0.03)[TOPICS], TOPICS),
        0.03,
    ),
    "change in topics": change_in_topics,
    "eight draws": lambda rng: control_draws(rng, 8),
    "three draws": lambda rng: control_draws(rng, 3),
    "trainings on both sides": trainings_on_both_sides,
    "three seeds alike": seeds_that_hardly_differ,
    "requests asked twice": requests_asked_twice,
    "three trainings": lambda rng: (metrics.t_interval(rng.normal(0.4, 0.1, 3)), 0.4),
    "nats of prompts": lambda rng: (metrics.mean(rng.gamma(2.0, 0.5, 40)), 1.0),
    "perplexity of texts": perplexity_of_texts,
}


@pytest.mark.parametrize("kind", STUDIES)
def test_coverage_is_at_least_90_percent_where_95_is_said(kind, record_property):
    """Every interval in use, simulated: 500 studies of each kind. The table is the properties of the JUnit report."""
    rng = np.random.default_rng(11)
    found = [STUDIES[kind](rng) for _ in range(500)]
    covered = np.mean([interval.low <= truth <= interval.high for interval, truth in found])
    record_property("coverage", round(float(covered), 3))
    record_property("mean width", round(float(np.mean([i.high - i.low for i, _ in found])), 3))
    assert covered >= 0.9
    assert np.mean([i.high - i.low for i, _ in found]) < 1.2, "an interval that says nothing covers always"


def test_an_interval_knows_its_degrees_of_freedom():
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    assert metrics.mean(values).freedom == 11 and metrics.mean(values, np.repeat(range(4), 3)).freedom == 3
    assert metrics.ratio(values, np.ones(12)).exp().freedom == 11
    assert metrics.pooled([metrics.Interval(v, v - 1, v + 1, 9) for v in values[:3]]).freedom == 2
    assert metrics.wilson(3, 9).freedom == math.inf
    plain = metrics.clustered_difference(np.zeros(12), values)
    assert plain.freedom == pytest.approx(11) and plain.within(-1, 1).freedom == plain.freedom
    trainings = values[:3, None] + 0.001 * rng.normal(size=(3, 12))
    few = metrics.clustered_difference(np.zeros(12), trainings)
    assert 2 <= few.freedom < 2.1, "what varies are three trainings, however many the prompts"
    assert few.as_wide_as(plain).freedom == few.freedom
    assert metrics.clustered_difference(np.zeros(12), np.zeros(12)).freedom == metrics.FREEDOM_OF_THREE
    copied = copy.deepcopy(few)
    assert (copied, copied.freedom) == (few, few.freedom)


# ------------------------------------------------------------------------------------------------- tests, agreement


def test_sign_flip_equals_enumeration():
    rng = np.random.default_rng(2)
    before, after = rng.normal(size=(2, 9))
    change = after - before
    signs = np.array(np.meshgrid(*[[-1, 1]] * 9)).reshape(9, -1).T
    exact = (np.abs(signs @ change) >= abs(change.sum()) - 1e-12).mean()
    assert metrics.sign_flip_p_value(before, after, draws=10_000) == pytest.approx(exact, abs=0.005)
    assert metrics.sign_flip_p_value([0, 1, 0], [0, 1, 0]) == 1.0
    assert math.isnan(metrics.sign_flip_p_value([math.nan], [1]))


def test_holm_by_hand_in_the_order_given():
    found = metrics.holm([0.04, math.nan, 0.01, 0.03])
    assert found[:1] + found[2:] == pytest.approx([0.06, 0.03, 0.06]) and math.isnan(found[1])
    assert metrics.holm([]) == []


def test_cohen_kappa_by_hand():
    first = ["a"] * 25 + ["b"] * 25 + [None]
    second = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15 + ["a"]
    kappa = metrics.cohen_kappa(first, second)
    assert kappa.value == pytest.approx(0.4) and kappa.n == 50 and kappa.low < 0.4 < kappa.high
    assert math.isnan(metrics.cohen_kappa(["a", "a"], ["a", "a"]).value)
    refused("got 1 and 2", lambda: metrics.cohen_kappa(["a"], ["a", "b"]))
