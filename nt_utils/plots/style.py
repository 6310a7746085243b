"""The one look of all figures: palette, matplotlib settings, widths, and the pieces that figures are built from."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from nt_utils.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

#: Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#7F7F7F"
STYLE: dict[RcKeyType, Any] = {
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",  # letters as outlines: the file needs no font
    "svg.hashsalt": "nt_utils",  # the same file for the same figure
    "figure.constrained_layout.use": True,
}
#: Width presets in inches with their font sizes: a report's text, one of its two columns, a slide.
WIDTHS = {"text": (6.8, 9.0), "column": (3.35, 7.0), "slide": (10.0, 13.0)}
_width = "text"


@contextlib.contextmanager
def look(width: str = "text") -> Iterator[None]:
    """Everything drawn inside has the one look, at a width preset. Raises InputError for an unknown one."""
    global _width
    if width not in WIDTHS:
        raise InputError(f"width: got {width!r}; allowed: {', '.join(WIDTHS)}")
    size = WIDTHS[width][1]
    fonts: dict[RcKeyType, Any] = {key: size for key in ("font.size", "axes.titlesize", "axes.labelsize")}
    ticks: dict[RcKeyType, Any] = {key: 0.9 * size for key in ("legend.fontsize", "xtick.labelsize", "ytick.labelsize")}
    before, _width = _width, width
    try:
        with plt.rc_context(STYLE | fonts | ticks):
            yield
    finally:
        _width = before


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {}


def figure(function: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
    """Register a figure function under its own name."""
    FIGURES[function.__name__] = function
    return function


def panels(rows: int = 1, columns: int = 1, height: float = 2.8, ratios: Sequence[float] | None = None, **more):
    """A figure of the preset's width and its axes as a [rows, columns] array; panels of one column stand below each other.

    ``ratios``: heights of the rows, relative to each other.
    """
    inches, size = WIDTHS[_width]
    below = columns if _width == "column" else 1
    if ratios is not None:
        more["height_ratios"] = np.repeat(ratios, below)
    if below > 1:
        drawn, axes = plt.subplots(rows * columns, 1, figsize=(inches, 0.8 * height * columns), squeeze=False, **more)
        return drawn, axes.reshape(rows, columns)
    scale = size / WIDTHS["text"][1]
    return plt.subplots(rows, columns, figsize=(inches, height * max(scale, 1)), squeeze=False, **more)


def fit(drawn: Figure) -> None:
    """Make what is written for a page's width fit a column: long titles and labels in several lines, legends below."""
    if _width != "column":
        return
    texts = [drawn._suptitle, drawn._supxlabel, drawn._supylabel]
    for ax in drawn.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label]
        legend = ax.get_legend()
        if legend is not None and legend.get_bbox_to_anchor().x0 >= ax.bbox.x1:
            labels = [t.get_text() for t in legend.get_texts()]
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.27), "ncols": 2}
            ax.legend(legend.legend_handles, labels, title=legend.get_title().get_text(), **place)
    for text in filter(None, texts):
        text.set_text("\n".join(textwrap.fill(line, 38) for line in text.get_text().split("\n")))
    for legend in drawn.legends:
        handles, labels = legend.legend_handles, [t.get_text() for t in legend.get_texts()]
        legend.remove()
        drawn.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)))


def watermark(drawn: Figure, words: str) -> None:
    """Words across a figure, behind which everything can still be read."""
    drawn.text(0.5, 0.5, words, ha="center", va="center", rotation=20, fontsize=26, color=GREY, alpha=0.22, zorder=10)


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
