"""Rates, differences and agreement, each with its count and its interval. Plain numbers in, plain numbers out.

Wilson for one rate; a paired bootstrap over prompts for a difference within one run; a t interval over seeds (a
bootstrap of three seeds covers 84%, not 95%); Holm's correction where many comparisons are made.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nt_utils.errors import InputError

if TYPE_CHECKING:
    import pandas
    from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """An estimate with its interval and the number of observations behind it. NaN where n is 0."""

    value: float
    low: float
    high: float
    n: int


def wilson(count: int, n: int, level: float = 0.95) -> Interval:
    """A rate count/n with Wilson's score interval (Wilson 1927); rate and limits are NaN for n = 0."""
    if not 0 <= count <= n:
        raise InputError(f"count must lie between 0 and n = {n}, got {count}")
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    z = _normal_quantile(level)
    rate, z2 = count / n, z * z
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if count == 0 else max(0.0, centre - half)
    high = 1.0 if count == n else min(1.0, centre + half)
    return Interval(rate, low, high, n)


def paired_difference(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Interval:
    """Mean of after - before over the same prompts, with a percentile bootstrap interval over the prompts.

    Pairs in which either value is NaN (not judged) are left out; n is the number of pairs that remain. Where every pair
    changes alike, resampling shows no spread and would claim certainty: the interval is then widened by 3/n (the rule
    of three: an outcome never seen in n trials has a rate below about 3/n), within the range of a difference of rates.
    """
    import numpy as np

    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if first.shape != second.shape or first.ndim != 1:
        raise InputError(
            f"before and after must hold one value for the same prompts, got {first.size} and {second.size}"
        )
    change = (second - first)[~np.isnan(first + second)]
    found = bootstrap_mean(change, seed=seed, draws=draws, level=level)
    if found.n and found.low == found.high and abs(found.value) <= 1:
        return Interval(found.value, max(-1.0, found.value - 3 / found.n), min(1.0, found.value + 3 / found.n), found.n)
    return found


def clustered_difference(
    controls: ArrayLike, after: ArrayLike, clusters: ArrayLike, *, seed: int = 0, draws: int = 4000, level: float = 0.95
) -> Interval:
    """Mean of after - controls, with a bootstrap that resamples clusters of prompts and the control draws together.

    Args:
        controls: outcomes under each control draw, ``[draws, prompts]`` (one row: a plain paired comparison).
        after: outcomes on the same prompts, ``[prompts]``.
        clusters: cluster of each prompt, 0, 1, ...: prompts of one topic are not independent of each other.

    Prompts with a NaN anywhere are left out; n is the number of prompts that remain. Without any spread the interval
    is widened by the rule of three, as in :func:`paired_difference`.
    """
    import numpy as np

    table = np.atleast_2d(np.asarray(controls, dtype=float))
    change = np.asarray(after, dtype=float)[None, :] - table
    kept = ~np.isnan(change).any(axis=0)
    change, groups = change[:, kept], np.unique(np.asarray(clusters)[kept], return_inverse=True)[1]
    rows, n = change.shape
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(seed)
    size = int(groups.max()) + 1
    row_weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=draws) / rows
    prompt_weights = generator.multinomial(size, np.full(size, 1 / size), size=draws)[:, groups]
    means = ((row_weights @ change) * prompt_weights).sum(axis=1) / np.maximum(prompt_weights.sum(axis=1), 1)
    tail = (1 - level) / 2
    value = float(change.mean())
    low, high = (float(q) for q in np.quantile(means, [tail, 1 - tail]))
    if low == high:
        low, high = max(-1.0, value - 3 / n), min(1.0, value + 3 / n)
    return Interval(value, low, high, n)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, draws: int = 10_000, level: float = 0.95) -> Interval:
    """Mean with a percentile bootstrap interval; NaN without values, a point without spread for one value."""
    import numpy as np

    sample = np.asarray(values, dtype=float)
    sample = sample[~np.isnan(sample)]
    if sample.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(seed)
    rows = max(1, min(draws, 20_000_000 // sample.size))  # chunks keep the index table below 160 MB
    means = np.concatenate(
        [
            sample[generator.integers(0, sample.size, (min(rows, draws - start), sample.size))].mean(axis=1)
            for start in range(0, draws, rows)
        ]
    )
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(sample.mean()), float(low), float(high), int(sample.size))


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval; the limits are NaN for fewer than two values."""
    import numpy as np
    from scipy import stats

    sample = np.asarray(values, dtype=float)
    sample = sample[~np.isnan(sample)]
    if sample.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    if sample.size == 1:
        return Interval(float(sample[0]), math.nan, math.nan, 1)
    half = float(stats.t.ppf(0.5 + level / 2, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size))
    mean = float(sample.mean())
    return Interval(mean, mean - half, mean + half, int(sample.size))


def sign_flip_p_value(before: Sequence[float], after: Sequence[float], *, seed: int = 0, draws: int = 10_000) -> float:
    """Two-sided p-value of the mean paired difference under random exchange of the two conditions of each prompt."""
    import numpy as np

    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    change = change[~np.isnan(change)]
    if change.size == 0:
        return math.nan
    generator = np.random.default_rng(seed)
    observed = abs(change.sum())
    hits = 0
    for start in range(0, draws, 1000):
        signs = generator.choice((-1.0, 1.0), (min(1000, draws - start), change.size))
        hits += int((np.abs(signs @ change) >= observed - 1e-12).sum())
    return (hits + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979). NaN stays NaN and is not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p))
        adjusted[i] = running
    return adjusted


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Interval:
    """Cohen's kappa of two judges on the same items, with its large-sample interval (Cohen 1960).

    Items that either judge left unjudged (None or NaN) are left out. Two judges that agree everywhere on one single
    verdict have no defined kappa: NaN.
    """
    pairs = _judged(first, second)
    n = len(pairs)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    observed = sum(a == b for a, b in pairs) / n
    labels = {label for pair in pairs for label in pair}
    expected = sum(sum(a == x for a, _ in pairs) * sum(b == x for _, b in pairs) for x in labels) / n**2
    if expected == 1.0:
        return Interval(math.nan, math.nan, math.nan, n)
    kappa = (observed - expected) / (1 - expected)
    half = _normal_quantile(0.95) * math.sqrt(observed * (1 - observed) / n) / (1 - expected)
    return Interval(kappa, kappa - half, min(1.0, kappa + half), n)


def confusion(first: Sequence[Hashable], second: Sequence[Hashable], names=("first", "second")) -> pandas.DataFrame:
    """Counts of every pair of verdicts; what was not judged stands as "not judged"."""
    import pandas

    if len(first) != len(second):
        raise InputError(f"the two judges must have seen the same items, got {len(first)} and {len(second)}")
    rows, columns = ([("not judged" if is_missing(v) else v) for v in values] for values in (first, second))
    return pandas.crosstab(pandas.Series(rows, name=names[0]), pandas.Series(columns, name=names[1]))


def is_missing(value: object) -> bool:
    """None and NaN: not judged."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _judged(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[tuple[Hashable, Hashable]]:
    if len(first) != len(second):
        raise InputError(f"the two judges must have seen the same items, got {len(first)} and {len(second)}")
    return [(a, b) for a, b in zip(first, second, strict=True) if not (is_missing(a) or is_missing(b))]


def _normal_quantile(level: float) -> float:
    from statistics import NormalDist

    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)
