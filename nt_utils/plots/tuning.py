"""Figures of notebook 02: what SN-Tune and its controls gain and cost, step by step."""

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
    is_rate,
    note,
    ordered,
    panels,
    percent,
    rate_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BANDS = "bands: 95% intervals, of several draws the smallest and the largest"


def _look(arms: list[str]) -> dict[str, dict]:
    """Colour and line of each arm: chosen neurons coloured and solid, random ones grey, other ways of tuning dashed."""
    looks, colour, grey = {}, 0, 0
    for arm in arms:
        if "random" in arm:
            looks[arm] = {"color": GREY, "ls": (":", "-.", "--")[grey % 3], "marker": "osv"[grey % 3]}
            grey += 1
        else:
            baseline = arm in ("full", "LoRA")
            looks[arm] = {
                "color": COLOURS[colour % 8],
                "ls": "--" if baseline else "-",
                "marker": "D" if baseline else "o",
            }
            colour += 1
    return looks


def _rate_axis(ax: Axes, metric: str) -> None:
    """Percent from 0 to 1 for rates, plain numbers for what is none."""
    if is_rate(metric):
        percent(ax.yaxis)
        ax.set_ylim(-0.03, 1.03)


@figure
def sn_steps(table: pd.DataFrame) -> Figure:
    """Notebook 02: rates against training steps, each arm at its own rate; the filled marker is the chosen step.

    Columns: arm, step, metric, value, low, high, n, chosen.
    """
    names, arms = ordered(table["metric"]), ordered(table["arm"])
    looks = _look(arms)
    drawn, axes = panels(-(-len(names) // 2), 2, height=2.35 * -(-len(names) // 2) + 0.9, sharex=True)
    for ax, metric in zip(axes.flat, names, strict=False):
        for arm in arms:
            rows = table[(table["metric"] == metric) & (table["arm"] == arm)].sort_values("step")
            look = looks[arm]
            ax.plot(rows["step"], rows["value"], color=look["color"], ls=look["ls"], lw=1.4, label=arm)
            ax.fill_between(rows["step"], rows["low"], rows["high"], color=look["color"], alpha=0.07, lw=0)
            stop = rows[rows["chosen"]]
            ax.plot(stop["step"], stop["value"], ls="", marker=look["marker"], color=look["color"], ms=5)
        _rate_axis(ax, metric)
        ax.set_title(f"{metric} ({counts(table[table['metric'] == metric])})")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("training steps")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3)
    note(drawn, f"marker: the step chosen on the development split; {BANDS}", table)
    return drawn


@figure
def sn_tradeoff(table: pd.DataFrame) -> Figure:
    """Notebook 02: harmful score against what is kept and what is avoided, a line over steps for each arm.

    Columns: arm, step, metric, value, low, high, n, chosen, target; the first metric is the harmful score.
    """
    harm, *others = (m for m in ordered(table["metric"]) if is_rate(m))
    arms, wide = ordered(table["arm"]), table.pivot(index=["arm", "step"], columns="metric", values="value")
    looks = _look(arms)
    drawn, axes = panels(1, len(others), height=3.6, sharey=True)
    for ax, metric in zip(axes[0], others, strict=True):
        for arm in arms:
            rows, look = wide.loc[arm].sort_index(), looks[arm]
            ax.plot(rows[metric], rows[harm], color=look["color"], ls=look["ls"], lw=1.1, marker=".", ms=4, label=arm)
            stop = table[(table["arm"] == arm) & table["chosen"]]["step"].iloc[0]
            ax.plot(rows.loc[stop, metric], rows.loc[stop, harm], marker=look["marker"], color=look["color"], ms=7)
        ax.axhline(table["target"].iloc[0], color="#000000", lw=0.8, ls=(0, (1, 2)))
        percent(ax.xaxis)
        percent(ax.yaxis)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel(metric)
    axes[0, 0].set_ylabel(harm)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3)
    seen = counts(table[table["metric"].map(is_rate)])
    note(drawn, f"large: the step chosen on the development split; dotted: the harmful score to reach ({seen})", table)
    return drawn


@figure
def sn_equal(table: pd.DataFrame) -> Figure:
    """Notebook 02: what is kept and lost where every arm's harmful score comes down to the same level.

    Columns: arm, step, target, metric, value, low, high, n.
    """
    names, arms = ordered(table["metric"]), ordered(table["arm"])
    steps = table.groupby("arm", sort=False)["step"].first()
    looks = _look(arms)
    drawn, axes = panels(1, len(names), height=0.34 * len(arms) + 1.2, sharey=True)
    for ax, metric in zip(axes[0], names, strict=True):
        rows = table[table["metric"] == metric]
        for arm, part in rows.groupby("arm", sort=False):
            look = looks[arm]
            interval(ax, [arms.index(arm)], part, look["color"], horizontal=True, fmt=look["marker"])
        rate_rows(ax, [f"{arm} (step {steps[arm]:.0f})" for arm in arms], f"{metric}\n({counts(rows)})")
    level = f"{table['target'].iloc[0]:.0%}"
    note(drawn, f"rate where the harmful score comes down to {level}; 95% intervals over topics", table)
    return drawn


@figure
def sn_sides(table: pd.DataFrame) -> Figure:
    """Notebook 02: chosen against random neurons for each trained side. Columns: sides, arm, step, metric, value, n."""
    sides, arms, names = (ordered(table[c]) for c in ("sides", "arm", "metric"))
    looks = _look(arms)
    drawn, axes = panels(len(names), len(sides), height=1.75 * len(names) + 0.9, sharex=True, sharey="row")
    for row, metric in enumerate(names):
        for ax, side in zip(axes[row], sides, strict=True):
            for arm in arms:
                part = table[(table["metric"] == metric) & (table["arm"] == arm) & (table["sides"] == side)]
                part, look = part.sort_values("step"), looks[arm]
                ax.plot(part["step"], part["value"], color=look["color"], ls=look["ls"], lw=1.4, label=arm)
                ax.fill_between(part["step"], part["low"], part["high"], color=look["color"], alpha=0.1, lw=0)
            _rate_axis(ax, metric)
            if row == 0:
                ax.set_title(side)
        axes[row, 0].set_ylabel(f"{metric}\n({counts(table[table['metric'] == metric])})")
    for ax in axes[-1]:
        ax.set_xlabel("training steps")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(arms))
    note(drawn, BANDS, table)
    return drawn


@figure
def sn_wrappers(table: pd.DataFrame) -> Figure:
    """Notebook 02: ASR of wrapper attacks before and after, by class. Columns: attack, state, value, low, high, n."""
    attacks, states = ordered(table["attack"]), ordered(table["state"])
    drawn, axes = panels(height=0.34 * len(attacks) + 1.1)
    ax = axes[0, 0]
    looks = _look(states[1:])
    for i, state in enumerate(states):
        rows = table[table["state"] == state]
        y = np.array([attacks.index(a) for a in rows["attack"]]) + 0.18 * (i - (len(states) - 1) / 2)
        colour = looks[state]["color"] if state in looks else "#000000"
        interval(ax, y, rows, colour, horizontal=True, label=state)
    few = table[table["attack"] == attacks[0]]["n"].max()
    rate_rows(ax, attacks)
    classes = counts(table[table["attack"] != attacks[0]]) if len(attacks) > 1 else counts(table)
    ax.set_xlabel(f"ASR inside wrappers, 95% Wilson intervals ({attacks[0]}: n = {few}; a class: {classes})")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(states))
    return drawn


@figure
def rsn_finetuning(table: pd.DataFrame) -> Figure:
    """Notebook 02: later harmless fine-tuning of models that were tuned differently.

    Columns: arm, step, metric, value, low, high, n.
    """
    names, arms = ordered(table["metric"]), ordered(table["arm"])
    looks = _look(arms)
    drawn, axes = panels(1, len(names), height=3.0, sharex=True)
    for ax, metric in zip(axes[0], names, strict=True):
        for i, arm in enumerate(arms):
            rows = table[(table["metric"] == metric) & (table["arm"] == arm)].sort_values("step")
            look = looks[arm]
            shift = 0.012 * rows["step"].max() * (i - (len(arms) - 1) / 2)
            style = {"fmt": "o", "ls": look["ls"], "ms": 3.5, "lw": 1.3}
            interval(ax, rows["step"] + shift, rows, look["color"], label=arm, **style)
        _rate_axis(ax, metric)
        ax.set_title(f"{metric}\n({counts(table[table['metric'] == metric])})")
        ax.set_xlabel("later fine-tuning steps")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend([h[0] for h in handles], labels, loc="outside lower center", ncols=min(3, len(arms)))
    note(drawn, "95% Wilson intervals", table)
    return drawn
