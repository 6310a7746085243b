"""Figures of notebook 01: where safety neurons lie, what zeroing them does, how stable they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nt_utils.plots.style import (
    COLOURS,
    GREY,
    across,
    colours,
    counts,
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
    rates,
)


@figure
def where(table: pd.DataFrame) -> Figure:
    """Notebook 01: share of each projection's neurons that a rule chooses. Columns: rule, layer, kind, share, count."""
    return layer_maps(table, "rule", "kind", "chosen, % of the projection", lambda rule, _: rule)


@figure
def tokens(table: pd.DataFrame) -> Figure:
    """Notebook 01: single neurons' activations over the tokens of a harmful and of a harmless prompt.

    Columns: prompt, position, token, neuron, value.
    """
    prompts, neurons = ordered(table["prompt"]), ordered(table["neuron"])
    drawn, axes = panels(len(prompts), 1, height=2.1 * len(prompts), sharey=True)
    paint = colours(neurons)
    for ax, prompt in zip(axes[:, 0], prompts, strict=True):
        rows = table[table["prompt"] == prompt]
        for neuron, part in rows.groupby("neuron", sort=False):
            ax.plot(part["position"], part["value"], "o-", ms=3, color=paint[str(neuron)], label=neuron)
        first = rows.drop_duplicates("position")
        labels = [str(t).replace("\n", "\\n").strip() or "space" for t in first["token"].fillna("")]
        ax.set_xticks(first["position"], labels, rotation=60, ha="right", fontsize=6.5)
        ax.axhline(0, color=GREY, lw=0.8)
        ax.set_title(prompt)
        ax.set_ylabel("activation")
    legend(drawn, len(neurons))
    return drawn


@figure
def deactivation(table: pd.DataFrame) -> Figure:
    """Notebook 01: the model with each set of neurons zeroed.

    Columns: condition, group (none, chosen, control), metric, value, low, high, n. Random controls: the
    mean over the draws with a t interval over them, and the largest draw with its own interval.
    """
    conditions = ordered(table["condition"])
    paint = colours(conditions)
    drawn, parts = across(table, "metric", height=0.29 * len(conditions) + 1.1, sharey=True)
    for ax, metric, rows in parts:
        for condition, part in rows.groupby("condition", sort=False):
            interval(ax, [conditions.index(condition)], part, paint[str(condition)], horizontal=True)
        rate_rows(ax, conditions, f"{metric}\n({counts(rows)})")
    note(drawn, "95% intervals; of a mean of draws: 95% t interval over the draws", table)
    return drawn


@figure
def dose(table: pd.DataFrame) -> Figure:
    """Notebook 01: every measure against the share of the pool that is zeroed, one panel each.

    Columns: rule, share (0: untouched; missing: an intervention without a dose), metric, value, low, high, n; broken, where
    perplexity was measured.
    Hollow marks: perplexity on real text is over 1.5 times the untouched model's.
    """
    rules, count = ordered(table["rule"]), table["metric"].nunique()
    drawn, parts = across(table, "metric", height=2.35 * -(-count // 3) + 0.7, most=min(count, 3), sharex=True)
    lines = dict(zip((r for r in rules if r.startswith("random")), ("--", ":", "-."), strict=False))
    paint, broken = colours(rules), table.get("broken", pd.Series(False, index=table.index)).astype(bool)
    for ax, metric, rows in parts:
        for rule in rules:
            part = rows[rows["rule"] == rule].sort_values("share")
            if part.empty:
                continue
            if not (part["share"] > 0).any():
                style = "-" if (part["share"] == 0).all() else "--"
                ax.axhline(part["value"].iloc[0], color=paint[rule], ls=style, lw=1.1, label=rule, zorder=1)
                continue
            dashes = lines.get(rule, "-")
            ax.plot(part["share"], part["value"], dashes, color=paint[rule], lw=1.3, zorder=2)
            hollow = broken[part.index].to_numpy()
            for marks, face in ((part[~hollow], paint[rule]), (part[hollow], "white")):
                ax.plot(marks["share"], marks["value"], "o", color=paint[rule], mfc=face, ms=4, zorder=3)
            ax.plot([], [], "o", ls=dashes, color=paint[rule], ms=4, lw=1.3, label=rule)
            ax.fill_between(part["share"], part["low"], part["high"], color=paint[rule], alpha=0.14, lw=0)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:g}%")
        rates(ax, metric)
        if "perplexity" in metric and rows["value"].max() > 5 * rows["value"].min():
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
            ax.yaxis.set_minor_formatter(lambda v, _: "")
        ax.set_title(f"{metric}\n({counts(rows)})")
    for ax in drawn.axes[-min(count, 3) :]:
        ax.set_xlabel("share of the pool zeroed")
    legend(drawn, min(3, len(rules)))
    note(drawn, "bands: 95% intervals; random: smallest to largest draw; hollow: perplexity over 1.5 times", table)
    return drawn


@figure
def factorial(table: pd.DataFrame) -> Figure:
    """Notebook 01: the sixteen rules between the paper's and contrast, at every dose, best first.

    Columns: share, positions, benign, prompts, scale, against, broken, value (jailbroken), low, high, n.
    """
    table = table.assign(label=table[["positions", "benign", "prompts", "scale"]].agg(", ".join, axis=1))
    order = table.groupby("label")["value"].mean().sort_values(ascending=False).index.tolist()
    drawn, parts = across(table, "share", height=0.26 * len(order) + 1.2, sharey=True, sharex=True)
    for ax, share, rows in parts:
        for name, part in rows.groupby("label"):
            last = str(name).startswith("last")
            face = {"mfc": "white"} if part["broken"].astype(bool).any() else {}
            interval(ax, [order.index(name)], part, COLOURS[1 if last else 0], horizontal=True, **face)
        rate_rows(ax, order, f"{100 * share:g}% of the pool", rates=False)
        ax.axvline(0, color=GREY, lw=0.8)
        percent(ax.xaxis)
        ax.set_xlabel("jailbroken, points")
    against = ordered(table["against"])
    note(drawn, f"against {', '.join(against)}; hollow: perplexity over 1.5 times; 95% intervals", table)
    return drawn


@figure
def languages(table: pd.DataFrame) -> Figure:
    """Notebook 01: zeroing one language's safety neurons, evaluated in each language.

    Columns: zeroed, evaluated, value (ASR), low, high, n, jaccard, chance (the last two for the pair of sets).
    """
    zeroed, evaluated = ordered(table["zeroed"]), ordered(table["evaluated"])
    drawn, axes = panels(height=2.6)
    ax, paint = axes[0, 0], colours(zeroed)
    for i, name in enumerate(zeroed):
        rows = table[table["zeroed"] == name]
        x = np.array([evaluated.index(v) for v in rows["evaluated"]]) + 0.13 * (i - (len(zeroed) - 1) / 2)
        interval(ax, x, rows, paint[name], label=name)
    ax.set_xticks(range(len(evaluated)), [f"asked in {v}" for v in evaluated])
    ax.set_xlim(-0.5, len(evaluated) - 0.5)
    rates(ax)
    ax.set_ylabel("direct ASR\n(95% intervals)")
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
    ax, rules = axes[0, 0], ordered(table["rule"])
    paint = colours(rules)
    for i, rule in enumerate(rules):
        rows = table[table["rule"] == rule].sort_values("prompts")
        x = rows["prompts"] * 1.03 ** (i - (len(rules) - 1) / 2)
        interval(ax, x, rows, paint[rule], fmt="o-", label=rule)
        ax.plot(x, rows["chance"], ":", color=paint[rule], lw=1.2)
    log_axis(ax, table["prompts"])
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("prompts in each of the two disjoint subsets")
    ax.set_ylabel("Jaccard of the two sets")
    ax.set_title(f"mean and middle 95% of {int(table['n'].max())} pairs; dotted: layer-matched chance")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn
