"""Figures of the benchmarks."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from nt_utils.plots.style import COLOURS, figure, legend, panels


@figure
def growth(table: pd.DataFrame) -> Figure:
    """Time of exact scores and of the plain forward against prompt length, layers and width.

    Columns: sweep (the column that varies), tokens, layers, width, forward_ms, exact_ms, expected_ms.
    """
    labels = {"tokens": "tokens in a prompt", "layers": "layers", "width": "hidden size"}
    drawn, axes = panels(1, len(labels), height=2.6, sharey=True)
    series = (
        ("forward_ms", "o-", COLOURS[0], "plain forward"),
        ("exact_ms", "s-", COLOURS[1], "exact scores of all neurons"),
        ("expected_ms", "--", COLOURS[6], "expected from the formulas"),
    )
    for ax, (sweep, label) in zip(axes[0], labels.items(), strict=True):
        part = table[table["sweep"] == sweep]
        for column, line, colour, name in series:
            ax.loglog(part[sweep], part[column], line, color=colour, ms=4, label=name)
        ax.set_xlabel(label)
        ax.set_xticks(part[sweep], [str(x) for x in part[sweep]])
        ax.minorticks_off()
    axes[0, 0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # powers would be formulas, and stand there raw
    axes[0, 0].set_ylabel("milliseconds a batch")
    legend(drawn, len(series))
    return drawn
