"""Figures of notebook 03: where units of each category lie, what pruning them does, on what the categories depend."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nt_utils.plots.style import (
    CATEGORY_COLOURS,
    GREY,
    across,
    counts,
    curve,
    figure,
    interval,
    layer_maps,
    legend,
    log_axis,
    note,
    ordered,
    panels,
    percent,
    rate_rows,
)


@figure
def units_where(table: pd.DataFrame) -> Figure:
    """Notebook 03: share of each layer's units in each category. Columns: layer, unit, category, count, units, share."""

    def title(kind: str, rows: pd.DataFrame) -> str:
        return f"{kind.replace('ffn', 'FFN')}s ({int(rows['units'].max())} a layer)"

    return layer_maps(table, "unit", "category", "% of the layer's units", title, fmt=".0f", top=100, below="")


@figure
def units_pruning(table: pd.DataFrame) -> Figure:
    """Notebook 03: the dense model, each category pruned, and random units in their place (the paper's Table 1).

    Columns: condition, group (none, chosen, control), share, metric, value, low, high, n.
    """
    conditions, shares = ordered(table["condition"]), table.groupby("condition", sort=False)["share"].first()
    drawn, parts = across(table, "metric", height=0.29 * len(conditions) + 1.1, sharey=True)
    for ax, metric, rows in parts:
        for condition, part in rows.groupby("condition", sort=False):
            name = str(condition).removeprefix("random, matched to ").split(",")[0]
            colour = "#000000" if part["group"].iloc[0] == "none" else CATEGORY_COLOURS.get(name, GREY)
            hollow = {"mfc": "white"} if part["group"].iloc[0] == "control" else {}
            interval(ax, [conditions.index(condition)], part, colour, horizontal=True, **hollow)
        labels = [f"{c} ({100 * shares[c]:.3g}%)" if c in CATEGORY_COLOURS else c for c in conditions]
        rate_rows(ax, labels, f"{metric}\n({counts(rows)})")
    note(drawn, "95% intervals over topics; of a mean of draws: 95% t interval over the draws", table)
    return drawn


@figure
def units_growth(table: pd.DataFrame) -> Figure:
    """Notebook 03: each group grown until pruning costs the stated amount. Columns: category, share, chosen, cost, value."""
    drawn, parts = across(table, "cost", height=2.7, sharey=True)
    for ax, cost, part in parts:
        for name in ordered(table["category"]):
            rows = part[part["category"] == name]
            curve(ax, "share", rows, CATEGORY_COLOURS[name], "o-", ms=4, mfc="white", label=name)
            chosen = rows[rows["chosen"]]
            ax.plot(chosen["share"], chosen["value"], "o", color=CATEGORY_COLOURS[name], ms=6)
        ax.axhline(0, color="black", lw=0.6)
        log_axis(ax, table["share"], lambda share: f"{100 * share:g}%")
        ax.set_xlabel("share of the units pruned")
        percent(ax.yaxis)
        ax.set_title(f"{cost} (development split)")
    parts[0][0].legend(title="filled: chosen")
    return drawn


@figure
def units_sensitivity(table: pd.DataFrame) -> Figure:
    """Notebook 03: agreement of two disjoint calibration sets by their size.

    Columns: variant, prompts, category, value (mean Jaccard), low, high (middle 95% of the pairs), n, chance.
    """
    drawn, parts = across(table, "variant", height=2.9, sharey=True)
    for ax, variant, part in parts:
        for i, name in enumerate(CATEGORY_COLOURS):
            rows = part[part["category"] == name].sort_values("prompts")
            x = rows["prompts"] * 1.05 ** (i - 1.5)
            interval(ax, x, rows, CATEGORY_COLOURS[name], fmt="o-", ms=3.5, label=name)
            ax.plot(x, rows["chance"], ":", color=CATEGORY_COLOURS[name], lw=1.1)
        log_axis(ax, table["prompts"])
        ax.set_ylim(0, 1.03)
        ax.set_title(variant)
        ax.set_xlabel("prompts of each kind")
    parts[0][0].set_ylabel("Jaccard of the two maps' sets")
    legend(drawn, 4)
    drawn.legends[0].set_title(
        f"middle 95% of {int(table['n'].max())} pairs of disjoint sets; dotted: layer-matched chance"
    )
    return drawn


@figure
def units_agreement(table: pd.DataFrame) -> Figure:
    """Notebook 03: agreement with the default map when one thing changes.

    Columns: changed, category, value (mean Jaccard), low, high (middle 95%), n, chance.
    """
    changes = ordered(table["changed"])
    drawn, axes = panels(height=0.36 * len(changes) + 1.2)
    ax = axes[0, 0]
    for i, name in enumerate(CATEGORY_COLOURS):
        rows = table[table["category"] == name]
        y = np.array([changes.index(c) for c in rows["changed"]]) + 0.17 * (i - 1.5)
        interval(ax, y, rows, CATEGORY_COLOURS[name], horizontal=True, ms=3.5, label=name)
        ax.plot(rows["chance"], y, "|", color=CATEGORY_COLOURS[name], ms=6)
    rate_rows(ax, changes, rates=False)
    ax.set_xlim(-0.02, 1.03)
    ax.set_xlabel("Jaccard with the default map")
    ax.set_title(f"mean and middle 95% of {int(table['n'].max())} random halves; bars: layer-matched chance")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn
