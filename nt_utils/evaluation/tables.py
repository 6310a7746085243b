"""Evaluations side by side, as the tables behind figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas

from nt_utils.evaluation.judges import VERDICTS

if TYPE_CHECKING:
    from nt_utils.evaluation.suite import Evaluation

#: What is shown of a set: the first metric of these that the set has, and its name in figures.
HEADLINES = {"asr": "ASR", "over_refusal": "over-refusal", "helpful": "correct answers", "refusal": "refusal"}


def answered(found: Evaluation) -> pandas.DataFrame:
    """The rows of an evaluation that hold an answer."""
    return found.rows[found.rows["response"].notna()] if "response" in found.rows else found.rows.iloc[:0]


def behaviour_table(evaluations: Mapping[str, Evaluation], groups: bool = False) -> pandas.DataFrame:
    """The headline rate of every set: columns model, set, metric, value, low, high, n.

    ``groups``: also the rates of a set's parts ("wrapped/seen").
    """
    rows = []
    for model, found in evaluations.items():
        for name, part in found.table.groupby("set", sort=False):
            if "/" in str(name) and not groups:
                continue
            metric = next((m for m in HEADLINES if m in set(part["metric"])), None)
            if metric is None:
                continue
            line = part[part["metric"] == metric].iloc[0]
            rows.append((model, name, HEADLINES[metric], line["rate"], line["low"], line["high"], int(line["n"])))
    return pandas.DataFrame(rows, columns=["model", "set", "metric", "value", "low", "high", "n"])


def verdict_table(evaluations: Mapping[str, Evaluation]) -> pandas.DataFrame:
    """Share of every verdict in every set: columns model, set, verdict, share, n. Unjudged rows are left out of n."""
    rows = []
    for model, found in evaluations.items():
        for name, part in answered(found).groupby("set", sort=False):
            judged = part["verdict"].dropna()
            shares = judged.value_counts(normalize=True)
            rows += [(model, name, v, float(shares.get(v, 0.0)), len(judged)) for v in VERDICTS]
    return pandas.DataFrame(rows, columns=["model", "set", "verdict", "share", "n"])


def example_table(evaluations: Mapping[str, Evaluation], per_set: int = 2) -> pandas.DataFrame:
    """The first prompts of every set with each model's answer and its verdict."""
    firsts = {name: answered(found).groupby("set", sort=False).head(per_set) for name, found in evaluations.items()}
    table = next(iter(firsts.values()))[["set", "text"]].reset_index(drop=True)
    for model, part in firsts.items():
        table[model] = [f"{a} [{v}]" for a, v in zip(part["response"], part["verdict"], strict=True)]
    return table
