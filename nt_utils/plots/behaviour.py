"""Figures of notebook 00."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nt_utils.plots.style import COLOURS, across, counts, figure, interval, ordered, panels, percent, rate_rows


@figure
def behaviour(table: pd.DataFrame) -> Figure:
    """Notebook 00: rates of the model, and of its unaligned counterpart where there is one, on every prompt set.

    Columns: model, set, metric, value, low, high, n.
    """
    table = table.assign(label=table["set"] + "\n" + table["metric"])
    labels = ordered(table["label"])
    drawn, axes = panels(height=0.36 * len(labels) + 1.0)
    ax = axes[0, 0]
    models = ordered(table["model"])
    for i, model in enumerate(models):
        rows = table[table["model"] == model]
        y = np.array([labels.index(v) for v in rows["label"]]) + 0.16 * (i - (len(models) - 1) / 2)
        interval(ax, y, rows, COLOURS[i], horizontal=True, label=model)
    rate_rows(ax, [label.replace("\n", ": ") for label in labels])
    ax.set_xlabel(f"share of prompts, 95% intervals over topics ({counts(table)})")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(models))
    return drawn


@figure
def verdicts(table: pd.DataFrame) -> Figure:
    """Notebook 00: what the answers are, as shares. Columns: model, set, verdict, share, n."""
    sets, names = ordered(table["set"]), ordered(table["verdict"])
    drawn, parts = across(table, "model", height=0.3 * len(sets) + 1.3, sharey=True)
    for ax, model, part in parts:
        rows = part.pivot_table(index="set", columns="verdict", values="share", sort=False)
        left = np.zeros(len(sets))
        for colour, name in zip(COLOURS, names, strict=False):
            width = rows.reindex(sets)[name].fillna(0).to_numpy() if name in rows else np.zeros(len(sets))
            ax.barh(range(len(sets)), width, left=left, color=colour, label=name, height=0.75)
            left += width
        ax.set_title(model)
        rate_rows(ax, sets, rates=False)
        ax.set_xlim(0, 1)
        percent(ax.xaxis)
        ax.grid(axis="y", visible=False)
    drawn.supxlabel(f"share of answers ({counts(table)} prompts a set)", fontsize=9)
    drawn.legend(*parts[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names))
    return drawn
