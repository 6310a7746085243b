"""Figures of notebook 04: freezing under fine-tuning, flows between categories, alignment budget, leaning to refusal."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from nt_utils.plots.style import (
    CATEGORY_COLOURS,
    COLOURS,
    GREY,
    across,
    counts,
    curve,
    figure,
    interval,
    legend,
    note,
    ordered,
    panels,
    percent,
    rate_rows,
    rates,
)


def _colour(arm: str, i: int) -> str:
    return "#000000" if arm == "full" else GREY if "random" in arm else COLOURS[i]


def _best_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Of every fine-tuning set and arm the rows at the learning rate with the lowest held-out loss."""
    keys = ["rows", "arm", "learning_rate"]
    lowest = table.groupby(keys)["loss"].min().reset_index().sort_values("loss").drop_duplicates(keys[:2])
    return table.merge(lowest[keys], on=keys)


@figure
def attack_curves(table: pd.DataFrame) -> Figure:
    """Notebook 04: rates over the steps of fine-tuning, every arm at the rate that learns its task best.

    Columns: rows (fine-tuning set), arm, learning_rate, step, loss (held-out, nats a token), metric, value, low, high, n.
    """
    sets, shown, arms = ordered(table["rows"]), ordered(table["metric"]), ordered(table["arm"])
    drawn, axes = panels(len(shown), len(sets), height=2.3 * len(shown) + 0.8, sharey="row", sharex=True)
    best = _best_rates(table)
    for c, name in enumerate(sets):
        for r, metric in enumerate(shown):
            ax, rows = axes[r, c], best[(best["rows"] == name) & (best["metric"] == metric)]
            _over_steps(ax, rows, arms, f"{metric}\n({counts(rows)})" if c == 0 else "", ms=3.5, band=0.08)
        axes[0, c].set_title(name)
        axes[-1, c].set_xlabel("steps of fine-tuning")
    legend(drawn, 3)
    note(drawn, "bands: 95% intervals; every arm at the learning rate with the lowest held-out loss", table)
    return drawn


def _over_steps(ax: Axes, rows: pd.DataFrame, arms: list[str], label: str, **look) -> None:
    """One panel of an attack: every arm's rate over the steps."""
    for i, arm in enumerate(arms):
        curve(ax, "step", rows[rows["arm"] == arm], _colour(arm, i), "o-", label=arm, **look)
    rates(ax)
    if label:
        ax.set_ylabel(label)


@figure
def attack_sweep(table: pd.DataFrame) -> Figure:
    """Notebook 04, appendix: the whole sweep of the fine-tuning attack, one column a learning rate.

    Columns as :func:`attack_curves`; the adapter's rates stand under the full arms' they belong to.
    """
    sets, arms = ordered(table["rows"]), ordered(table["arm"])
    metric = ordered(table["metric"])[0]
    table = table.assign(column=table.groupby("arm")["learning_rate"].rank(method="dense").astype(int))
    columns = sorted(table["column"].unique())
    drawn, axes = panels(len(sets), len(columns), height=2.2 * len(sets) + 0.8, sharey=True, sharex=True)
    for r, name in enumerate(sets):
        for c, column in enumerate(columns):
            chosen = (table["rows"] == name) & (table["metric"] == metric) & (table["column"] == column)
            rows = table[chosen]
            _over_steps(axes[r, c], rows, arms, f"{metric}\n({counts(rows)})" if c == 0 else "", ms=3, lw=1.2)
            used = " or ".join(f"{rate:g}" for rate in sorted(rows["learning_rate"].unique()))
            axes[r, c].set_title(f"{name}, rate {used}")
    for ax in axes[-1]:
        ax.set_xlabel("steps of fine-tuning")
    legend(drawn, 3)
    return drawn


@figure
def attack_points(table: pd.DataFrame) -> Figure:
    """Notebook 04: each arm at its worst point and at equal held-out loss (the paper's Tables 2 and 3).

    Columns: rows, compared, arm, learning_rate, step, loss, metric, value, low, high, n.
    """
    sets, shown, arms = ordered(table["rows"]), ordered(table["metric"]), ordered(table["arm"])
    compared = ordered(table["compared"])
    drawn, axes = panels(
        len(sets), len(shown), height=(0.3 * len(arms) + 0.9) * len(sets) + 0.5, sharey=True, sharex=True
    )
    for r, name in enumerate(sets):
        for c, metric in enumerate(shown):
            ax = axes[r, c]
            rows = table[(table["rows"] == name) & (table["metric"] == metric)]
            for i, how in enumerate(compared):
                part = rows[rows["compared"] == how]
                y = np.array([arms.index(a) for a in part["arm"]]) + 0.2 * (i - (len(compared) - 1) / 2)
                interval(ax, y, part, COLOURS[i], horizontal=True, ms=4, label=how)
            size = f", {counts(rows)}" if len(rows) else ""
            rate_rows(ax, arms, f"{metric}\n({name}{size})")
    legend(drawn, len(compared))
    note(drawn, "95% intervals over topics, and over the trainings where an arm has several", table)
    return drawn


def _ribbon(ax: Axes, left: tuple[float, float], right: tuple[float, float], colour: str) -> None:
    """A band from heights ``left`` at x = 0 to heights ``right`` at x = 1."""
    (a, b), (c, d) = left, right
    points = [(0.06, a), (0.5, a), (0.5, c), (0.94, c), (0.94, d), (0.5, d), (0.5, b), (0.06, b), (0.06, a)]
    codes = [Curve.MOVETO, *[Curve.CURVE4] * 3, Curve.LINETO, *[Curve.CURVE4] * 3, Curve.CLOSEPOLY]
    ax.add_patch(PathPatch(Curve(points, codes), facecolor=colour, alpha=0.45, lw=0))


@figure
def unit_flow(table: pd.DataFrame) -> Figure:
    """Notebook 04: how units change category (the paper's Fig. 5 and 6). Columns: change, before, after, count, share.

    Heights are shares of all units on a square-root scale, without which 3% would not be seen; the percentages are exact.
    """
    order = list(CATEGORY_COLOURS)
    drawn, parts = across(table, "change", height=3.9)
    for ax, change, rows in parts:
        grid = rows.pivot_table(index="before", columns="after", values="share").reindex(index=order, columns=order)
        ends = [_bars(ax, grid.sum(axis=1 - side), x) for side, x in ((0, 0.0), (1, 0.94))]
        at = [{name: ends[side][name][0] for name in order} for side in (0, 1)]
        for before in order:
            for after in order:
                bands = []
                for side, (name, total) in enumerate(((before, grid.loc[before].sum()), (after, grid[after].sum()))):
                    low, high = ends[side][name]
                    height = (high - low) * grid.loc[before, after] / max(total, 1e-12)
                    bands.append((at[side][name], at[side][name] + height))
                    at[side][name] += height
                if grid.loc[before, after] > 0:
                    _ribbon(ax, bands[0], bands[1], CATEGORY_COLOURS[before])
        kept = rows[rows["before"] == rows["after"]].set_index("before")["share_of_before"]
        ax.set_title(f"{change}\nSCU that stay: {100 * kept['SCU']:.0f}%")
        ax.set_xlim(-0.3, 1.3)
        ax.set_ylim(1.02, -0.02)
        ax.set_axis_off()
    return drawn


def _bars(ax: Axes, shares: pd.Series, x: float) -> dict[str, tuple[float, float]]:
    """A column of category bars from the top down; category -> (start, end)."""
    roots, gap = np.sqrt(shares.clip(lower=0)), 0.03
    heights = roots / roots.sum() * (1 - gap * (len(roots) - 1))
    top, found = 0.0, {}
    for name, height in heights.items():
        found[str(name)] = (top, top + height)
        corners = [(x, top), (x + 0.06, top), (x + 0.06, top + height), (x, top + height), (x, top)]
        ax.add_patch(PathPatch(Curve(corners), facecolor=CATEGORY_COLOURS[str(name)], lw=0))
        at, side = (x - 0.03, "right") if x < 0.5 else (x + 0.09, "left")
        ax.text(at, top + height / 2, f"{name}\n{100 * shares[name]:.0f}%", ha=side, va="center", fontsize=7.5)
        top += height + gap
    return found


@figure
def align_budget(table: pd.DataFrame) -> Figure:
    """Notebook 04: the unaligned model aligned by training some units only (the paper's Table 4, with safety).

    Columns: arm, learning_rate, trained (share of the parameters), metric, value, low, high, n.
    """
    arms, trained = ordered(table["arm"]), table.groupby("arm", sort=False)["trained"].first()
    drawn, parts = across(table, "metric", height=0.34 * len(arms) + 1.1, sharey=True)
    for ax, metric, rows in parts:
        for i, arm in enumerate(arms):
            colour = "#000000" if arm in ("unaligned", "full") else CATEGORY_COLOURS.get(arm, COLOURS[2])
            hollow = {"mfc": "white"} if arm == "unaligned" or "random" in arm else {}
            interval(ax, [i], rows[rows["arm"] == arm], colour, horizontal=True, **hollow)
        rate_rows(ax, [f"{a} ({100 * trained[a]:.0f}% trained)" for a in arms], f"{metric}\n({counts(rows)})")
    note(drawn, "95% intervals over topics", table)
    return drawn


@figure
def direction(table: pd.DataFrame) -> Figure:
    """Notebook 04: leaning to refusal by layer (the paper's Fig. 2-4). Columns: model, variant, layer, value, low, high, n."""
    models = ordered(table["model"])
    drawn, parts = across(table, "variant", height=2.8)
    for ax, variant, rows in parts:
        for i, model in enumerate(models):
            curve(ax, "layer", rows[rows["model"] == model], COLOURS[i], "o-", band=0.2, ms=3.5, label=model)
        ax.axhline(0, color="black", lw=0.7)
        _layer_axis(ax, table)
        ax.set_title(f"{variant}\n({counts(table)})", fontsize=8)
    parts[0][0].set_ylabel("cosine with refusal\nminus cosine with compliance")
    legend(drawn, len(models))
    note(drawn, "bands: 95% intervals over topics", table)
    return drawn


@figure
def probe(table: pd.DataFrame) -> Figure:
    """Notebook 04: cross-validated accuracy of a linear probe. Columns: model, layer, value, low, high, n, majority."""
    drawn, axes = panels(height=2.6)
    ax = axes[0, 0]
    for i, model in enumerate(ordered(table["model"])):
        rows = table[table["model"] == model]
        interval(ax, rows["layer"] + 0.06 * (i - 0.5), rows, COLOURS[i], fmt="o-", label=f"states of the {model} model")
    ax.axhline(table["majority"].iloc[0], color="black", lw=0.8, ls=":")
    _layer_axis(ax, table)
    percent(ax.yaxis)
    ax.set_ylim(top=1.02)
    ax.set_ylabel("probe accuracy")
    ax.set_title(f"does the aligned model refuse? ({counts(table)})")
    legend(drawn, 2)
    note(drawn, "95% intervals over topics; dotted: the commoner answer", table)
    return drawn


def _layer_axis(ax: Axes, table: pd.DataFrame) -> None:
    layers = sorted(table["layer"].unique())
    step = max(1, len(layers) // 8)
    ax.set_xticks(layers[::step], ["emb." if n == 0 else str(n) for n in layers[::step]])
    ax.set_xlabel("after block")
