"""Rates, differences and agreement, each with its count and its interval. Plain numbers in, plain numbers out.

Prompts of one topic are not independent, and a random control is one draw of many: intervals take both into account.
Their coverage is simulated in tests/evaluation/test_metrics.py. Statistics' packages are imported where they are used:
they are slow to import, and the tables of claims start without them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nt_utils.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class _Estimate(NamedTuple):
    value: float
    low: float
    high: float
    n: int


class Interval(_Estimate):
    """An estimate with its interval and the number of observations behind it: four numbers. NaN where n is 0.

    freedom: degrees of freedom of the t distribution that the limits come from (inf: the normal one), which tell how sure
    the estimate is at other levels than 95%. An attribute, for tables show the four numbers.
    """

    freedom: float

    def __new__(cls, value: float, low: float, high: float, n: int, freedom: float = math.inf) -> Interval:
        """An interval whose degrees of freedom are known."""
        made = super().__new__(cls, value, low, high, n)
        made.freedom = freedom
        return made

    def _replace(self, **changes: Any) -> Interval:
        return Interval(**(self._asdict() | {"freedom": self.freedom} | changes))

    def exp(self) -> Interval:
        """The exponential of the value and of its limits: a perplexity from nats a token."""
        return Interval(math.exp(self.value), math.exp(self.low), math.exp(self.high), self.n, self.freedom)

    def within(self, lowest: float, highest: float) -> Interval:
        """The same with limits that go no further: a rate lies between 0 and 1, whatever a normal interval says."""
        return self._replace(low=max(self.low, lowest), high=min(self.high, highest))

    def as_wide_as(self, other: Interval) -> Interval:
        """This value, its limits at least as far away as the other's are from its own value, within -1 and 1.

        For a rate interpolated between two evaluated steps: there every prompt has nearly the same outcome, a weight,
        and the spread that an interval rests on is that at an evaluated step.
        """
        low = self.value - max(self.value - self.low, other.value - other.low)
        high = self.value + max(self.high - self.value, other.high - other.value)
        return Interval(self.value, low, high, self.n, min(self.freedom, other.freedom)).within(-1.0, 1.0)


NOTHING = Interval(math.nan, math.nan, math.nan, 0)
#: Of an interval by the rule of three: the chance of seeing nothing is exp(-3 m) for a rate of m times its limit, and Student's
#: t with five degrees gives as much there, to .0003, or more.
FREEDOM_OF_THREE = 5.0


# ------------------------------------------------------------------------------------------------------------- rates


def wilson(count: float, n: float, level: float = 0.95) -> Interval:
    """A rate count/n with Wilson's score interval (Wilson 1927); rate and limits are NaN for n = 0."""
    if not 0 <= count <= n:
        raise InputError(f"count must lie between 0 and n = {n}, got {count}")
    if n == 0:
        return NOTHING
    z = _quantile(level)
    rate, z2 = count / n, z * z
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if count == 0 else max(0.0, centre - half)
    high = 1.0 if count == n else min(1.0, centre + half)
    return Interval(rate, low, high, int(n))


def rate(hits: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Interval:
    """The mean of outcomes 0 and 1 (NaN: not judged) with Wilson's interval for clustered prompts.

    The interval is that of as many independent prompts as the clusters are worth: n over the design effect, with the t
    quantile of the number of clusters (Korn and Graubard 1998; Dean and Pagano 2015). Where all outcomes are alike, that
    is the number of clusters: nothing seen in 26 topics of 8 prompts says as much as 26 prompts do, not as 208.
    """
    values, groups = _judged(hits, clusters)
    n, size = len(values), len(np.unique(groups))
    if n == 0 or size == n:
        return wilson(values.sum(), n, level)
    p = values.mean()
    worth, freedom = float(size), math.inf
    if 0 < p < 1 and size > 1:
        variance = _cluster_variance(values - p, groups)
        effect = max(1.0, variance / (p * (1 - p) / n))
        worth, freedom = n / effect * (_quantile(level) / _quantile(level, size - 1)) ** 2, size - 1
    found = wilson(p * worth, worth, level)
    return Interval(float(p), found.low, found.high, n, freedom)


# ------------------------------------------------------------------------------------------------- means, differences


def mean(values: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Interval:
    """A mean with a t interval over clusters of prompts (None: every prompt is its own); NaN values are left out.

    One value, or one cluster, has no interval: its limits are NaN.
    """
    kept, groups = _judged(values, clusters)
    size = len(np.unique(groups))
    if not len(kept):
        return NOTHING
    value = float(kept.mean())
    if size == 1:
        return Interval(value, math.nan, math.nan, len(kept))
    half = _quantile(level, size - 1) * math.sqrt(_cluster_variance(kept - value, groups))
    return Interval(value, value - half, value + half, len(kept), size - 1)


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over seeds, draws or trainings with Student's t interval; the limits are NaN for fewer than two values."""
    return mean(values, None, level)


def pooled(found: Sequence[Interval], level: float = 0.95) -> Interval:
    """The mean of a quantity measured at several seeds, from its intervals; n is their number, two or more.

    Student's t with the variance between the seeds, or the mean variance that their own intervals tell where that is
    larger: few seeds may agree by chance, and then know no more than each of them.
    """
    values = np.array([f.value for f in found])
    within = np.mean([(max(f.value - f.low, f.high - f.value) / _quantile(level)) ** 2 for f in found])
    freedom = len(values) - 1
    half = _quantile(level, freedom) * math.sqrt(max(values.var(ddof=1), within) / len(values))
    return Interval(
        float(values.mean()), float(values.mean() - half), float(values.mean() + half), len(values), freedom
    )


def ratio(above: ArrayLike, below: ArrayLike, level: float = 0.95) -> Interval:
    """Sum of `above` over sum of `below`, one pair a text, with a t interval (linearised, Cochran 1977, section 6.4)."""
    first, second = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    if not second.sum():
        return NOTHING
    value = float(first.sum() / second.sum())
    spread = mean((first - value * second) * len(first) / second.sum(), None, level)
    return Interval(value, value + spread.low, value + spread.high, len(first), spread.freedom)


def clustered_difference(
    controls: ArrayLike,
    after: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """Mean of after - controls, with an interval over clusters of prompts and over the draws of both sides.

    The variance is the sum of three: between clusters, of the mean change, and of each side between the means of its draws
    over their number (one draw has none: the interval then speaks of that draw alone). The t quantile's degrees of freedom
    are Satterthwaite's (1946), so that 8 draws count as 8. Where no cluster differs from another the first is the rule of
    three over clusters: what was never seen in g clusters has a rate below about 3/g.

    Args:
        controls: outcomes under each control draw, ``[draws, prompts]`` (one row: a plain paired comparison).
        after: outcomes on the same prompts, ``[prompts]``, or of several draws or trainings, ``[draws, prompts]``.
        clusters: cluster of each prompt: prompts of one topic are not independent of each other.

    Prompts with a NaN anywhere are left out; n is the number of prompts that remain. Differences of rates stay within -1
    and 1.
    """
    table, last = (np.atleast_2d(np.asarray(side, dtype=float)) for side in (controls, after))
    if table.ndim != 2 or last.ndim != 2 or table.shape[1] != last.shape[1]:
        raise InputError(f"controls and after must hold the same prompts, got {table.shape[-1]} and {last.shape[-1]}")
    kept = ~(np.isnan(table).any(axis=0) | np.isnan(last).any(axis=0))
    table, last, n = table[:, kept], last[:, kept], int(kept.sum())
    if n == 0:
        return NOTHING
    groups = np.arange(n) if clusters is None else np.unique(np.asarray(clusters)[kept], return_inverse=True)[1]
    change = last.mean(0) - table.mean(0)
    value, size = float(change.mean()), int(groups.max()) + 1
    over_prompts = _cluster_variance(change - value, groups) if size > 1 else 0.0
    parts = [(over_prompts, size - 1)]
    parts += [(float(side.mean(1).var(ddof=1)) / len(side), len(side) - 1) for side in (table, last) if len(side) > 1]
    total = sum(variance for variance, _ in parts)
    half, freedom = 0.0, math.inf
    if total > 0:
        freedom = total**2 / sum(variance**2 / max(degrees, 1) for variance, degrees in parts)
        half = _quantile(level, freedom) * math.sqrt(total)
    if over_prompts < 1e-18:
        half, freedom = math.hypot(half, 3 / size), min(freedom, FREEDOM_OF_THREE)
    low, high = value - half, value + half
    if max(np.abs(table).max(), np.abs(last).max()) <= 1:
        low, high = max(-1.0, low), min(1.0, high)
    return Interval(value, low, high, n, freedom)


def _judged(values: ArrayLike, clusters: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """The values that are numbers, and their clusters as 0, 1, ..."""
    found = np.asarray(values, dtype=float)
    groups = np.arange(found.size) if clusters is None else np.asarray(clusters)
    if found.shape != groups.shape:
        raise InputError(f"clusters must be one for each value, got {groups.size} for {found.size}")
    kept = ~np.isnan(found)
    return found[kept], np.unique(groups[kept], return_inverse=True)[1]


def _cluster_variance(residuals: np.ndarray, groups: np.ndarray) -> float:
    """Variance of a mean from its residuals, prompts of a cluster summed first (Liang and Zeger 1986)."""
    sums = np.bincount(groups, weights=residuals)
    return float((sums**2).sum() / residuals.size**2 * len(sums) / (len(sums) - 1))


def _quantile(level: float, freedom: float | None = None) -> float:
    """Half-width of a two-sided interval in standard errors: Student's t, the normal distribution's without freedom."""
    from scipy import stats

    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    return float(stats.norm.ppf(0.5 + level / 2) if freedom is None else stats.t.ppf(0.5 + level / 2, freedom))


# ------------------------------------------------------------------------------------------------------ tests, agreement


def sign_flip_p_value(before: ArrayLike, after: ArrayLike, *, seed: int = 0, draws: int = 10_000) -> float:
    """Two-sided p-value of the mean paired difference under random exchange of the two conditions of each prompt."""
    from scipy import stats

    change, _ = _judged(np.asarray(after, dtype=float) - np.asarray(before, dtype=float), None)
    if change.size == 0:
        return math.nan
    if not change.any():
        return 1.0
    test = stats.permutation_test(
        (change,),
        lambda x, axis: np.abs(x.mean(axis=axis)),
        permutation_type="samples",
        vectorized=True,
        n_resamples=draws,
        batch=1000,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979). NaN stays NaN and is not counted."""
    from statsmodels.stats.multitest import multipletests

    found = np.asarray(p_values, dtype=float)
    known = ~np.isnan(found)
    if known.any():
        found[known] = multipletests(found[known], method="holm")[1]
    return found.tolist()


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Interval:
    """Cohen's kappa of two judges on the same items, with its large-sample interval (Cohen 1960).

    Items that either judge left unjudged (None or NaN) are left out. Two judges that agree everywhere on one single
    verdict have no defined kappa: NaN.
    """
    from statsmodels.stats.inter_rater import cohens_kappa

    if len(first) != len(second):
        raise InputError(f"the two judges must have seen the same items, got {len(first)} and {len(second)}")
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if not (is_missing(a) or is_missing(b))]
    labels = sorted({label for pair in pairs for label in pair}, key=repr)
    if len(labels) < 2:
        return Interval(math.nan, math.nan, math.nan, len(pairs))
    counts = np.zeros((len(labels), len(labels)))
    for a, b in pairs:
        counts[labels.index(a), labels.index(b)] += 1
    with np.errstate(invalid="ignore"):  # few items: no standard error, limits are NaN
        found = cohens_kappa(counts)
    return Interval(float(found.kappa), float(found.kappa_low), min(1.0, float(found.kappa_upp)), len(pairs))


def is_missing(value: object) -> bool:
    """None and NaN: not judged."""
    return value is None or (isinstance(value, float) and math.isnan(value))
