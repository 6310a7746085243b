"""The thirty claims: the table, the verdicts that follow from intervals, and Holm's correction."""

import math

import pytest
from scipy import stats

from nt_utils import definitions
from nt_utils.evaluation.metrics import FREEDOM_OF_THREE, Interval
from nt_utils.study import claims
from nt_utils.study.claims import FAILS, HOLDS, NOT_RUN, NOT_TESTABLE, UNDECIDED, Part, decide
from tests.common import refused

YES, NO, PERHAPS = Interval(0.5, 0.4, 0.6, 100), Interval(0.0, -0.1, 0.05, 100), Interval(0.15, 0.05, 0.25, 100)
FINE = Interval(1.1, 1.0, 1.2, 100)


def test_there_are_thirty_claims_with_at_most_sixty_rows():
    ids = [c.id for c in claims.CLAIMS]
    assert ids == [f"{letter}{i}" for letter, n in (("S", 10), ("A", 8), ("N", 8), ("X", 4)) for i in range(1, n + 1)]
    assert len(claims.rows()) <= 60
    assert set(definitions.names()) == set(claims.claim("X2").rows)
    for what in claims.CLAIMS:
        assert set(what.subjects) <= set(claims.SUBJECTS)
        assert what.why_not or what.subjects == claims.EVERY, "a subject that cannot test it needs a reason"
        for part in what.parts:
            assert (part.above is None) != (part.below is None)
            assert part.quantity


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (0.55, 0.7, {"above": 0.5}, HOLDS),
        (0.4, 0.7, {"above": 0.5}, UNDECIDED),
        (0.1, 0.5, {"above": 0.5}, FAILS),
        (0.01, 0.09, {"below": 0.1}, HOLDS),
        (0.05, 0.2, {"below": 0.1}, UNDECIDED),
        (0.1, 0.2, {"below": 0.1}, FAILS),
    ],
)
def test_a_parts_verdict_follows_from_interval_and_margin(low, high, margin, expected):
    assert Part("p", "q", **margin).verdict(((low + high) / 2, low, high, 9)) == expected


def test_a_p_value_equals_the_normal_and_the_t_tests():
    part = Part("p", "q", above=0.1)
    se, value = 0.05, 0.25
    half = stats.norm.ppf(0.975) * se
    found = Interval(value, value - half, value + half, 9)
    assert part.p_value(found) == pytest.approx(2 * stats.norm.sf((value - 0.1) / se))
    sample = [0.3, 0.2, 0.35, 0.28]
    test = stats.ttest_1samp(sample, 0.1)
    low, high = test.confidence_interval(0.95)
    assert part.p_value(Interval(sum(sample) / 4, low, high, 4, 3)) == pytest.approx(test.pvalue)


@pytest.mark.parametrize("freedom", [2, 7, math.inf])
@pytest.mark.parametrize("value", [0.05, 0.12, 0.19, 0.21, 0.3])
def test_a_p_value_is_below_five_percent_exactly_where_the_interval_leaves_the_margin_out(value, freedom):
    part = Part("p", "q", above=0.1)
    interval = Interval(value, value - 0.1, value + 0.07, 50, freedom)
    assert (part.p_value(interval) < 0.05) == (part.verdict(interval) != UNDECIDED)


def test_what_was_never_seen_is_no_surer_than_the_rule_of_three_says():
    """No change in 40 clusters, and a margin of 10 points: were the rate 10 points, that would happen with .9^40."""
    part, limit = Part("p", "q", below=0.1), 3 / 40
    p = part.p_value(Interval(0.0, -limit, limit, 40, FREEDOM_OF_THREE))
    assert 0.9**40 < p < 0.05
    assert part.p_value(Interval(0.0, -limit, limit, 40)) < 0.9**40, "the normal distribution would make it surer"
    for times in (1, 1.1, 1.5, 2, 3, 5):  # the margin in units of the limit
        assert Part("p", "q", below=times * limit).p_value(Interval(0.0, -limit, limit, 40, FREEDOM_OF_THREE)) > (
            math.exp(-3 * times) - 3e-4
        )
    unknown, fewest = (part.p_value(Interval(0.0, -limit, limit, 40, freedom)) for freedom in (math.nan, 1))
    assert unknown == fewest > p


@pytest.mark.parametrize(
    ("measured", "verdict", "part"),
    [
        ({"jailbroken": YES, "perplexity": FINE}, HOLDS, "jailbroken"),
        ({"jailbroken": PERHAPS, "perplexity": FINE}, UNDECIDED, "jailbroken"),
        ({"jailbroken": YES, "perplexity": Interval(3, 2, 4, 9)}, FAILS, "perplexity"),
        ({"jailbroken": NO}, FAILS, "jailbroken"),
        ({"jailbroken": YES}, NOT_RUN, ""),
        ({"jailbroken": YES, "perplexity": "no text"}, NOT_TESTABLE, "perplexity"),
        ({"jailbroken": NO, "perplexity": "no text"}, FAILS, "jailbroken"),
        ({}, NOT_RUN, ""),
    ],
)
def test_a_claim_needs_all_of_its_parts_and_one_refutes_it(measured, verdict, part):
    found = decide("S1", measured)
    assert (found.verdict, found.part) == (verdict, part)


def test_a_subject_that_cannot_test_a_claim_has_the_reason():
    assert decide("S9", {}, "Qwen/Qwen2.5-Coder-1.5B-Instruct") == claims.Verdict(NOT_TESTABLE, reason=claims.NO_BASE)
    assert decide("S9", {}, "testbed").verdict == NOT_RUN
    assert decide("S9", {}, "somebody/else").verdict == NOT_RUN


def stepped_down(p_values):
    """Which hypotheses Holm's procedure rejects at 5%, step by step as it is written (Holm 1979)."""
    rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and p_values[left[0]] < 0.05 / len(left):
        rejected.add(left.pop(0))
    return [i in rejected for i in range(len(p_values))]


def test_holms_correction_equals_the_procedure_and_never_makes_a_verdict_surer():
    values = [0.09, 0.115, 0.12, 0.13, 0.4, -0.3]
    part = claims.claim("S8").parts[0]
    verdicts = [decide("S8", {part.name: Interval(-v, -v - 0.06, -v + 0.06, 90)}) for v in values]
    verdicts.insert(2, claims.Verdict(NOT_RUN))
    tested = [v for v in verdicts if v.verdict != NOT_RUN]
    rejected = stepped_down([v.p for v in tested])
    expected = [v.verdict if sure else UNDECIDED for v, sure in zip(tested, rejected, strict=True)]
    expected.insert(2, NOT_RUN)
    assert claims.corrected(verdicts) == expected
    assert {v.verdict for v in tested} == {HOLDS, FAILS, UNDECIDED}
    assert expected.count(UNDECIDED) > [v.verdict for v in verdicts].count(UNDECIDED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("S99", "", "", YES), "claim: got 'S99'"),
        (("S1", "random", "jailbroken", YES), "row: got 'random'"),
        (("S1", "contrast", "", YES), "part: got ''"),
        (("S8", "", "", (0.1, math.nan, 0.2, 9)), "finite"),
        (("S8", "", "", (0.1, 0.2, 0.3, 9)), "low <= value"),
        (("S8", "", "", (0.1, 0.0, 0.3, 0)), "n=0"),
        (("S8", "", "", (0.1, 0.0)), "value, low, high and n"),
    ],
)
def test_what_is_no_measurement_is_refused(arguments, message):
    refused(message, lambda: claims.checked(*arguments))
