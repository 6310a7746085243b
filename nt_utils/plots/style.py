"""The one look of all figures: palette, matplotlib settings, widths, and the pieces that figures are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

#: Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#7F7F7F"
STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}
WIDTH = 6.8  # inches: the text width of a two-column report

FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {}


def figure(function: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
    """Register a figure function under its own name."""
    FIGURES[function.__name__] = function
    return function


def panels(rows: int = 1, columns: int = 1, height: float = 2.8, **more):
    """A figure of text width and its axes as a [rows, columns] array."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **more)


def percent(axis) -> None:
    """Ticks of shares as percent."""
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def interval(ax: Axes, x, rows: pd.DataFrame, colour, horizontal: bool = False, **more) -> None:
    """Points with their intervals."""
    value, low, high = (rows[c].to_numpy(float) for c in ("value", "low", "high"))
    error = np.vstack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
    style = {"fmt": "o", "color": colour, "ms": 4.5, "capsize": 2.5, "elinewidth": 1.1} | more
    if horizontal:
        ax.errorbar(value, x, xerr=error, **style)
    else:
        ax.errorbar(x, value, yerr=error, **style)


def counts(rows: pd.DataFrame) -> str:
    """ "n = 120" or "n = 40 to 120"."""
    low, high = int(rows["n"].min()), int(rows["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def ordered(values) -> list:
    """Distinct values in order of appearance."""
    return list(dict.fromkeys(values))


def legend_below(ax: Axes, columns: int = 4) -> None:
    """A legend under the axes."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)
