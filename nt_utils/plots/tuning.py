"""Figures of notebook 02: what SN-Tune and its controls gain and cost, step by step."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nt_utils.plots.style import (
    COLOURS,
    GREY,
    across,
    counts,
    curve,
    figure,
    interval,
    is_rate,
    legend,
    note,
    ordered,
    panels,
    percent,
    rate_rows,
    rates,
)

BANDS = "bands: 95% intervals, of several draws the smallest and the largest"


def _look(arms: list[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, line and marker of each arm: chosen neurons coloured and solid, random ones grey, other ways of tuning dashed."""
    random = [arm for arm in arms if "random" in arm]
    looks = {arm: (GREY, (":", "-.", "--")[i % 3], "osv"[i % 3]) for i, arm in enumerate(random)}
    for i, arm in enumerate(arm for arm in arms if arm not in looks):
        looks[arm] = (COLOURS[i % 8], *(("--", "D") if arm in ("full", "LoRA") else ("-", "o")))
    return looks


@figure
def sn_steps(table: pd.DataFrame) -> Figure:
    """Notebook 02: rates against training steps, each arm at its own rate; the filled marker is the chosen step.

    Columns: arm, step, metric, value, low, high, n, chosen.
    """
    looks, rows = _look(ordered(table["arm"])), -(-table["metric"].nunique() // 2)
    drawn, parts = across(table, "metric", height=2.35 * rows + 0.9, most=2, sharex=True)
    for ax, metric, part in parts:
        for arm, own in part.groupby("arm", sort=False):
            colour, line, marker = looks[str(arm)]
            curve(ax, "step", own, colour, line, band=0.07, lw=1.4, label=arm)
            stop = own[own["chosen"]]
            ax.plot(stop["step"], stop["value"], ls="", marker=marker, color=colour, ms=5)
        rates(ax, metric)
        ax.set_title(f"{metric} ({counts(part)})")
    for ax in drawn.axes[-2:]:
        ax.set_xlabel("training steps")
    legend(drawn, 3)
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
            rows, (colour, line, marker) = wide.loc[arm].sort_index(), looks[arm]
            ax.plot(rows[metric], rows[harm], color=colour, ls=line, lw=1.1, marker=".", ms=4, label=arm)
            stop = table[(table["arm"] == arm) & table["chosen"]]["step"].iloc[0]
            ax.plot(rows.loc[stop, metric], rows.loc[stop, harm], marker=marker, color=colour, ms=7)
        ax.axhline(table["target"].iloc[0], color="#000000", lw=0.8, ls=(0, (1, 2)))
        percent(ax.xaxis)
        rates(ax)
        ax.set_xlabel(metric)
    axes[0, 0].set_ylabel(harm)
    legend(drawn, 3)
    seen = counts(table[table["metric"].map(is_rate)])
    note(drawn, f"large: the step chosen on the development split; dotted: the harmful score to reach ({seen})", table)
    return drawn


@figure
def sn_equal(table: pd.DataFrame) -> Figure:
    """Notebook 02: what is kept and lost where every arm's harmful score comes down to the same level.

    Columns: arm, step, target, metric, value, low, high, n.
    """
    arms, steps = ordered(table["arm"]), table.groupby("arm", sort=False)["step"].first()
    looks = _look(arms)
    drawn, parts = across(table, "metric", height=0.34 * len(arms) + 1.2, sharey=True)
    for ax, metric, rows in parts:
        for arm, part in rows.groupby("arm", sort=False):
            colour, _, marker = looks[str(arm)]
            interval(ax, [arms.index(arm)], part, colour, horizontal=True, fmt=marker)
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
                curve(ax, "step", part, looks[arm][0], looks[arm][1], band=0.1, lw=1.4, label=arm)
            rates(ax, metric)
            if row == 0:
                ax.set_title(side)
        axes[row, 0].set_ylabel(f"{metric}\n({counts(table[table['metric'] == metric])})")
    for ax in axes[-1]:
        ax.set_xlabel("training steps")
    legend(drawn, len(arms))
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
        interval(ax, y, rows, looks[state][0] if state in looks else "#000000", horizontal=True, label=state)
    few = table[table["attack"] == attacks[0]]["n"].max()
    rate_rows(ax, attacks)
    classes = counts(table[table["attack"] != attacks[0]]) if len(attacks) > 1 else counts(table)
    ax.set_xlabel(f"ASR inside wrappers, 95% intervals over topics ({attacks[0]}: n = {few}; a class: {classes})")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(states))
    return drawn


@figure
def rsn_finetuning(table: pd.DataFrame) -> Figure:
    """Notebook 02: later harmless fine-tuning of models that were tuned differently.

    Columns: arm, step, metric, value, low, high, n.
    """
    arms = ordered(table["arm"])
    looks = _look(arms)
    drawn, parts = across(table, "metric", height=3.0, sharex=True)
    for ax, metric, part in parts:
        for i, arm in enumerate(arms):
            rows, (colour, line, _) = part[part["arm"] == arm].sort_values("step"), looks[arm]
            shift = 0.012 * rows["step"].max() * (i - (len(arms) - 1) / 2)
            interval(ax, rows["step"] + shift, rows, colour, label=arm, fmt="o", ls=line, ms=3.5, lw=1.3)
        rates(ax, metric)
        ax.set_title(f"{metric}\n({counts(part)})")
        ax.set_xlabel("later fine-tuning steps")
    handles, labels = parts[0][0].get_legend_handles_labels()
    lines = [handle[0] for handle in handles]  # type: ignore[index]  # without the bars
    drawn.legend(lines, labels, loc="outside lower center", ncols=min(3, len(arms)))
    note(drawn, "95% intervals over topics", table)
    return drawn
