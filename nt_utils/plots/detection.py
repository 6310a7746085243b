"""Figures of notebook 01: where safety neurons lie, what zeroing them does, how stable they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nt_utils.plots.style import (
    COLOURS,
    GREY,
    counts,
    figure,
    interval,
    layer_maps,
    note,
    ordered,
    panels,
    percent,
    rate_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@figure
def where(table: pd.DataFrame) -> Figure:
    """Notebook 01: share of each projection's neurons that a rule chooses. Columns: rule, layer, kind, share, count."""
    drawn, axes = layer_maps(table, "rule", "kind", "chosen, % of the projection", lambda rule, _: rule)
    for ax in axes[0]:
        ax.set_xlabel("projection")
    return drawn


@figure
def deactivation(table: pd.DataFrame) -> Figure:
    """Notebook 01: the model with each set of neurons zeroed.

    Columns: condition, group (none, chosen, control), metric, value, low, high, n. Random controls: the
    mean over the draws with a t interval over them, and the largest draw with its Wilson interval.
    """
    metrics, conditions = ordered(table["metric"]), ordered(table["condition"])
    drawn, axes = panels(1, len(metrics), height=0.29 * len(conditions) + 1.1, sharey=True)
    colours = {"none": "#000000", "chosen": COLOURS[1], "control": COLOURS[0]}
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = table[table["metric"] == metric]
        for group, part in rows.groupby("group", sort=False):
            y = [conditions.index(c) for c in part["condition"]]
            interval(ax, y, part, colours.get(str(group), GREY), horizontal=True)
        rate_rows(ax, conditions, f"{metric}\n({counts(rows)})")
    note(drawn, "95% Wilson intervals; of a mean of draws: 95% t interval over the draws", table)
    return drawn


@figure
def dose(table: pd.DataFrame) -> Figure:
    """Notebook 01: rates against the share of the pool that is zeroed.

    Columns: rule, share, metric, value, low, high, n.
    """
    metrics, rules = ordered(table["metric"]), ordered(table["rule"])
    drawn, axes = panels(1, len(metrics), height=3.1, sharey=True)
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = table[table["metric"] == metric]
        for i, rule in enumerate(rules):
            part = rows[rows["rule"] == rule].sort_values("share")
            colour = GREY if "random" in rule else COLOURS[i]
            ax.plot(part["share"], part["value"], "o-", color=colour, ms=3.5, label=rule)
            ax.fill_between(part["share"], part["low"], part["high"], color=colour, alpha=0.16, lw=0)
        ax.set_xscale("log")
        percent(ax.xaxis)
        ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:g}%")
        percent(ax.yaxis)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("share of the pool zeroed")
        ax.set_title(f"{metric}\n({counts(rows)})")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(rules))
    note(drawn, "bands: 95% Wilson intervals; random: mean, smallest and largest draw", table)
    return drawn


@figure
def languages(table: pd.DataFrame) -> Figure:
    """Notebook 01: zeroing one language's safety neurons, evaluated in each language.

    Columns: zeroed, evaluated, value (ASR), low, high, n, jaccard, chance (the last two for the pair of sets).
    """
    zeroed, evaluated = ordered(table["zeroed"]), ordered(table["evaluated"])
    drawn, axes = panels(height=2.6)
    ax = axes[0, 0]
    for i, name in enumerate(zeroed):
        rows = table[table["zeroed"] == name]
        x = np.array([evaluated.index(v) for v in rows["evaluated"]]) + 0.13 * (i - (len(zeroed) - 1) / 2)
        colour = "#000000" if name == "nothing" else GREY if "random" in name else COLOURS[i]
        interval(ax, x, rows, colour, label=name)
    ax.set_xticks(range(len(evaluated)), [f"asked in {v}" for v in evaluated])
    ax.set_xlim(-0.5, len(evaluated) - 0.5)
    ax.set_ylim(-0.03, 1.03)
    percent(ax.yaxis)
    ax.set_ylabel("direct ASR\n(95% Wilson intervals)")
    first = table.iloc[0]
    ax.set_title(
        f"overlap of the two sets: Jaccard {first['jaccard']:.2f}, by chance {first['chance']:.2f}; {counts(table)}"
    )
    ax.legend(title="zeroed", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


@figure
def stability(table: pd.DataFrame) -> Figure:
    """Notebook 01: agreement of a rule's sets between disjoint prompt subsets.

    Columns: rule, prompts, value (mean Jaccard over pairs), low, high (middle 95%), n (pairs), chance.
    """
    drawn, axes = panels(height=2.8)
    ax, rules = axes[0, 0], table["rule"].nunique()
    for i, rule in enumerate(ordered(table["rule"])):
        rows = table[table["rule"] == rule].sort_values("prompts")
        x = rows["prompts"] * 1.03 ** (i - (rules - 1) / 2)
        interval(ax, x, rows, COLOURS[i], fmt="o-", label=rule)
        ax.plot(x, rows["chance"], ":", color=COLOURS[i], lw=1.2)
    ax.set_xscale("log")
    ticks = sorted(table["prompts"].unique())
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("prompts in each of the two disjoint subsets")
    ax.set_ylabel("Jaccard of the two sets")
    ax.set_title(f"mean and middle 95% of {int(table['n'].max())} pairs; dotted: layer-matched chance")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn
