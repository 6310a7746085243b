"""The one look of all figures: palette, matplotlib settings, widths, and the pieces that figures are built from."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import AutoLocator, MaxNLocator, PercentFormatter

from nt_utils.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

#: Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#7F7F7F"
CATEGORY_COLOURS = {"SCU": COLOURS[1], "UCU": COLOURS[0], "CU": COLOURS[3], "RU": GREY}  # of units, in every figure
#: One colour for one name in every figure; a name belongs to the first entry that it starts with.
NAMED = {
    "untouched": "#000000",
    "none": "#000000",
    "random": GREY,
    "refusal direction": "#CC79A7",
    "as published": "#56B4E9",
    "as written": "#0072B2",
    "contrast": "#D55E00",
    "system prompt": "#E69F00",
}
STYLE: dict[RcKeyType, Any] = {
    "text.parse_math": False,  # a dollar sign in a prompt or a name is a dollar sign
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
#: Where a label may stand: points right of and above its place, and how it is aligned there.
SPOTS = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (6, 6, "left", "bottom"),
    (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"),
    (-6, -6, "right", "top"),
    *(
        (across * far, up * far, "left" if across > 0 else "right", "bottom" if up > 0 else "top" if up else "center")
        for far in (14, 24, 36, 50)
        for across, up in (
            (1, 0),
            (-1, 0),
            (1, 1),
            (1, -1),
            (-1, 1),
            (-1, -1),
            (1, 0.4),
            (1, -0.4),
            (-1, 0.4),
            (-1, -0.4),
        )
    ),
)
#: A label that stands further off, in points, is tied to its place by a line.
TIED = 20
#: Size of the line at a figure's foot, of the font's.
NOTE = 0.85
_width = "text"


@contextlib.contextmanager
def look(width: str = "text") -> Iterator[None]:
    """Everything drawn inside has the one look, at a width preset. Raises InputError for an unknown one.

    It starts from matplotlib's own defaults: a user's matplotlibrc (TeX, a dark theme) changes no figure.
    """
    global _width
    if width not in WIDTHS:
        raise InputError(f"width: got {width!r}; allowed: {', '.join(WIDTHS)}")
    size = WIDTHS[width][1]
    fonts: dict[RcKeyType, Any] = {key: size for key in ("font.size", "axes.titlesize", "axes.labelsize")}
    ticks: dict[RcKeyType, Any] = {key: 0.9 * size for key in ("legend.fontsize", "xtick.labelsize", "ytick.labelsize")}
    before, _width = _width, width
    try:
        with plt.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE | fonts | ticks)
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


def across(
    table: pd.DataFrame, column: str, height: float, most: int = 0, **more
) -> tuple[Figure, list[tuple[Axes, Any, pd.DataFrame]]]:
    """A figure with a panel for each value of a column, and (axes, value, rows) of every panel.

    The panels stand side by side, or ``most`` in a row of the given height.
    """
    values = ordered(table[column])
    width = most or len(values)
    rows = -(-len(values) // width)
    drawn, axes = panels(rows, width, height=height, **more)
    for ax in axes.flat[len(values) :]:
        ax.set_visible(False)
    return drawn, [(ax, value, table[table[column] == value]) for ax, value in zip(axes.flat, values, strict=False)]


def legend(drawn: Figure, columns: int) -> None:
    """The legend below a figure: every label of its panels once."""
    found: dict[str, Any] = {}
    for ax in drawn.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    drawn.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def fit(drawn: Figure) -> None:
    """Make what is written for a page's width fit a column: long titles and labels in several lines, legends below."""
    if _width != "column":
        return
    texts = [text for name in ("_suptitle", "_supxlabel", "_supylabel") if (text := getattr(drawn, name))]
    for ax in drawn.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label]
        legend = ax.get_legend()
        if legend is not None and legend.get_bbox_to_anchor().x0 >= ax.bbox.x1:
            labels = [t.get_text() for t in legend.get_texts()]
            place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.27), "ncols": 2}
            ax.legend(list(filter(None, legend.legend_handles)), labels, title=legend.get_title().get_text(), **place)
    for text in texts:
        text.set_text("\n".join(textwrap.fill(line, 38) for line in text.get_text().split("\n")))
    for legend in drawn.legends:
        handles, labels = list(filter(None, legend.legend_handles)), [t.get_text() for t in legend.get_texts()]
        title = "\n".join(textwrap.fill(line, 50) for line in legend.get_title().get_text().split("\n"))
        legend.remove()
        more: dict[str, Any] = {"title": title, "title_fontsize": NOTE * WIDTHS["column"][1]} if title else {}
        drawn.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), **more)


def watermark(drawn: Figure, words: str) -> None:
    """Words across a figure, behind which everything can still be read."""
    drawn.text(0.5, 0.5, words, ha="center", va="center", rotation=20, fontsize=26, color=GREY, alpha=0.22, zorder=10)


def is_rate(metric: str) -> bool:
    """Whether a metric is a share between 0 and 1: perplexity, divergence and likelihood are none."""
    return not any(word in metric for word in ("perplexity", "KL", "likelihood"))


def percent(axis) -> None:
    """Ticks of shares as whole percents: no steps of 2.5, which would be written as 2, 5, 8 and 10."""
    if isinstance(axis.get_major_locator(), AutoLocator):
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def rates(ax: Axes, metric: str = "") -> None:
    """An upright axis from 0 to 100%, unless the metric is none."""
    if is_rate(metric):
        percent(ax.yaxis)
        ax.set_ylim(-0.03, 1.03)


def log_axis(ax: Axes, values: Sequence[float] | pd.Series, form: Callable[[Any], str] = str) -> None:
    """A logarithmic axis across, with ticks at these values alone."""
    ticks = sorted(set(values))
    ax.set_xscale("log")
    ax.set_xticks(ticks, [form(tick) for tick in ticks])
    ax.minorticks_off()


def curve(ax: Axes, column: str, rows: pd.DataFrame, colour: str, line: str = "-", band: float = 0, **more) -> None:
    """Values over a column, with their band in this opacity."""
    rows = rows.sort_values(column)
    ax.plot(rows[column], rows["value"], line, color=colour, **more)
    if band:
        ax.fill_between(rows[column], rows["low"], rows["high"], color=colour, alpha=band, lw=0)


def interval(ax: Axes, x, rows: pd.DataFrame, colour, horizontal: bool = False, **more) -> None:
    """Points with their intervals."""
    value, low, high = (rows[c].to_numpy(float) for c in ("value", "low", "high"))
    error = np.vstack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
    style = {"fmt": "o", "color": colour, "ms": 4.5, "capsize": 2.5, "elinewidth": 1.1} | more
    if horizontal:
        ax.errorbar(value, x, xerr=error, **style)
    else:
        ax.errorbar(x, value, yerr=error, **style)


def cross(ax: Axes, x: Sequence[float], y: Sequence[float], **look) -> None:
    """The intervals of one point in both directions; x, y: value, low, high."""
    xerr, yerr = ([[max(value - low, 0)], [max(high - value, 0)]] for value, low, high in (x, y))
    ax.errorbar(x[0], y[0], xerr=xerr, yerr=yerr, ls="", **look)


def note(drawn: Figure, text: str, table: pd.DataFrame) -> None:
    """A small line at the foot of a figure that says what its bars and bands are.

    Of a table over seeds (column ``interval``) they are what that column says.
    """
    if "interval" in table:
        text = str(table["interval"].iloc[0])
    size = NOTE * WIDTHS[_width][1]
    if drawn.legends:
        drawn.legends[0].set_title(text, FontProperties(size=size))
    else:
        drawn.supxlabel(text, fontsize=size)


def rate_rows(ax: Axes, labels: Sequence[str], title: str = "", rates: bool = True) -> None:
    """Axes with one line a label, from the top down; ``rates``: 0 to 100% across."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    if rates:
        ax.set_xlim(-0.04, 1.04)
        percent(ax.xaxis)
    if title:
        ax.set_title(title)


def place_labels(ax: Axes, points: np.ndarray, places: np.ndarray, labels: Sequence[str], size: float = 7) -> None:
    """Write a label beside each place [n, 2], where it covers no point [m, 2] and no earlier label if there is such room.

    Of the spots around a place the first free one is taken, else the one that covers least. Limits must be set before.
    """
    drawn = ax.figure.get_figure(root=True)
    drawn.draw_without_rendering()  # the layout decides where points lie on the page
    dots = ax.transData.transform(points)
    pixel, taken = drawn.dpi / 72, list[Any]()
    for place, label in zip(places, labels, strict=True):
        found = []
        for spot in SPOTS:
            text = _label(ax, label, place, spot, size)
            box = text.get_window_extent().padded(pixel)
            text.remove()
            near = box.padded(3 * pixel)  # a point has a size
            covered = sum(box.overlaps(other) for other in taken) + sum(near.contains(*dot) for dot in dots)
            outside = not (ax.bbox.contains(box.x0, box.y0) and ax.bbox.contains(box.x1, box.y1))
            found.append((covered + 2 * outside, spot, box))
        _, spot, box = min(found, key=lambda f: f[0])
        tied = {"arrowstyle": "-", "lw": 0.5, "color": GREY} if max(map(abs, spot[:2])) > TIED else None
        _label(ax, label, place, spot, size, arrowprops=tied)
        taken.append(box)


def _label(ax: Axes, label: str, place: np.ndarray, spot: tuple, size: float, **more: Any) -> Any:
    dx, dy, across, up = spot
    options: dict[str, Any] = {"textcoords": "offset points", "fontsize": size, "ha": across, "va": up, **more}
    return ax.annotate(label, tuple(place), (dx, dy), annotation_clip=False, **options)


def layer_maps(
    table: pd.DataFrame,
    panel: str,
    columns: str,
    label: str,
    title: Callable[[str, pd.DataFrame], str],
    fmt: str = ".1f",
    top: float | None = None,
    below: str = "projection",
) -> Figure:
    """A heat map for each value of the column ``panel``: shares (0 to 1, drawn in percent) by layer and ``columns``.

    Args:
        label: of the colour bar; title: of a panel, from its name and its rows; top: percent at the end of the colours
            (None: the largest share); below: what stands under the columns.
    """
    import seaborn as sns

    names, layers = ordered(table[panel]), table["layer"].nunique()
    drawn, axes = panels(1, len(names), height=min(6.5, 1.6 + 0.26 * layers), sharey=True)
    top = max(100 * float(table["share"].max()), 1e-7) if top is None else top
    for ax, name in zip(axes[0], names, strict=True):
        rows = table[table[panel] == name]
        grid = rows.pivot_table(index="layer", columns=columns, values="share", sort=False)
        sns.heatmap(
            100 * grid,
            ax=ax,
            cmap="cividis",
            vmin=0,
            vmax=top,
            annot=layers <= 12,
            fmt=fmt,
            annot_kws={"size": 7.5},
            cbar=name == names[-1],
            cbar_kws={"label": label},
        )
        ax.set_title(title(name, rows).replace(", ", ",\n"))
        ax.set_xlabel("")
        ax.set_ylabel("layer" if name == names[0] else "")
        ax.tick_params(axis="y", rotation=0)
    for ax in axes[0]:  # after all heat maps, which lay the figure out as they are drawn
        ax.set_xlabel(below)
    return drawn


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: the one that NAMED gives it, else the next of the palette that nobody has."""
    found = {str(n): next((c for k, c in NAMED.items() if str(n).startswith(k)), "") for n in names}
    free = iter([c for c in COLOURS if c not in found.values()] + [GREY] * len(found))
    return {name: colour or next(free) for name, colour in found.items()}


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table with labels that matplotlib draws: it leaves a label that starts with an underscore out of a legend."""
    words = table.select_dtypes(include=["object", "string"]).columns
    return table.assign(
        **{c: table[c].map(lambda v: f" {v}" if isinstance(v, str) and v[:1] == "_" else v) for c in words}
    )


def counts(rows: pd.DataFrame) -> str:
    """ "n = 120" or "n = 40 to 120"."""
    low, high = int(rows["n"].min()), int(rows["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def ordered(values) -> list:
    """Distinct values in order of appearance."""
    return list(dict.fromkeys(values))
