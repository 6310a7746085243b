"""Figures of notebook 05: where the modulated neurons lie, how alpha is learnt, what it does, and the dial."""

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
    layer_maps,
    note,
    ordered,
    panels,
    percent,
    place_labels,
    rate_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = {"none": "#000000", "chosen": COLOURS[1], "control": COLOURS[0]}


@figure
def modulation_spread(table: pd.DataFrame) -> Figure:
    """Notebook 05: share of each projection's neurons that are modulated. Columns: role, layer, kind, count, share."""
    drawn, axes = layer_maps(
        table,
        "role",
        "kind",
        "modulated, % of the projection",
        lambda role, rows: f"{role} neurons ({int(rows['count'].sum())})",
    )
    for ax in axes[0]:
        ax.set_xlabel("projection")
    return drawn


@figure
def modulation_learning(table: pd.DataFrame) -> Figure:
    """Notebook 05: losses over the outer steps. Columns: method, iteration, loss, value (nats a token)."""
    methods = ordered(table["method"])
    styles = {"outer loss": "-", "support": "o", "support, adapted": "v", "validation": "s--"}
    drawn, axes = panels(1, len(methods), height=2.7, sharey=True)
    for ax, method in zip(axes[0], methods, strict=True):
        rows = table[table["method"] == method]
        for i, (name, style) in enumerate(styles.items()):
            part = rows[rows["loss"] == name]
            if len(part):
                ax.plot(part["iteration"], part["value"], style, color=COLOURS[i], ms=4, label=name)
        ax.set_title(method)
        ax.set_xlabel("outer step")
    axes[0, 0].set_ylabel("loss, nats a token")
    axes[0, 0].set_ylim(bottom=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return drawn


def _conditions(table: pd.DataFrame, columns: int) -> Figure:
    """One panel a metric, one row an arm."""
    metrics, arms = ordered(table["metric"]), ordered(table["arm"])
    rows = -(-len(metrics) // columns)
    drawn, axes = panels(rows, columns, height=rows * (0.19 * len(arms) + 0.75), sharey=True)
    for ax in axes.flat[len(metrics) :]:
        ax.set_visible(False)
    for ax, metric in zip(axes.flat, metrics, strict=False):
        part = table[table["metric"] == metric]
        base = part.loc[part["group"] == "none", "value"]
        if len(base):
            ax.axvline(float(base.iloc[0]), color=GREY, lw=0.8, ls=":")
        for group, some in part.groupby("group", sort=False):
            y = [arms.index(a) for a in some["arm"]]
            interval(ax, y, some, GROUPS.get(str(group), GREY), horizontal=True, ms=3.5, capsize=1.8)
        rate_rows(ax, arms, f"{metric}\n({counts(part)})", metric != "perplexity")
    draws = "; of a mean of draws: the smallest and the largest" if any(", mean of" in arm for arm in arms) else ""
    note(drawn, f"95% intervals{draws}; dotted: the untouched model", table)
    return drawn


@figure
def modulation_arms(table: pd.DataFrame) -> Figure:
    """Notebook 05: every arm on every rate. Columns: arm, group (none, chosen, control), metric, value, low, high, n.

    Dotted: the untouched model. Random arms: mean of the draws, from the smallest to the largest.
    """
    return _conditions(table, 3)


@figure
def modulation_ablations(table: pd.DataFrame) -> Figure:
    """Notebook 05: NeuronTune without one of its parts. Columns as in ``modulation_arms``."""
    return _conditions(table, 3)


def _label(setting) -> str:
    return f"{int(setting.n_safety)}+{int(setting.n_utility)}"


@figure
def modulation_dial(table: pd.DataFrame) -> Figure:
    """Notebook 05: rates over numbers of safety and utility neurons at the full strength.

    Columns: n_safety, n_utility, strength and one column a rate ("unseen ASR", "over-refusal", "utility", with
    "<rate> n"); the first row is the untouched model.
    """
    import seaborn as sns

    names = [c.removesuffix(" n") for c in table.columns if c.endswith(" n")]
    base = table.iloc[0]
    full = table[table["strength"] == table["strength"].max()]
    drawn, axes = panels(1, len(names), height=2.6, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        grid = full.pivot_table(index="n_safety", columns="n_utility", values=name)
        grid.loc[0, 0] = base[name]
        grid = 100 * grid.sort_index().sort_index(axis=1)
        sns.heatmap(grid, ax=ax, cmap="cividis", annot=True, fmt=".0f", annot_kws={"size": 8}, cbar=False)
        ax.invert_yaxis()
        ax.set_title(f"{name}, %\n(n = {int(base[f'{name} n'])})")
        ax.set_xlabel("utility neurons")
        ax.set_ylabel("safety neurons" if ax is axes[0, 0] else "")
        ax.tick_params(axis="y", rotation=0)
    return drawn


@figure
def modulation_frontier(table: pd.DataFrame) -> Figure:
    """Notebook 05: every setting of the dial, attack success against over-refusal; dominated ones hollow.

    Columns as in ``modulation_dial``, ``dominated``: another setting is as good in ASR, over-refusal and utility and
    better in one.
    """
    asr, refusals = [c.removesuffix(" n") for c in table.columns if c.endswith(" n")][:2]
    drawn, axes = panels(height=3.4)
    ax = axes[0, 0]
    strengths = sorted(s for s in table["strength"].unique() if s)
    for i, strength in enumerate(strengths):
        rows = table[table["strength"] == strength]
        for hollow, part in rows.groupby("dominated"):
            face = "none" if hollow else COLOURS[i]
            label = f"strength {strength:g}{', dominated' if hollow else ''}"
            ax.scatter(part[refusals], part[asr], s=34, facecolor=face, edgecolor=COLOURS[i], label=label)
    base = table.iloc[0]
    ax.scatter(base[refusals], base[asr], marker="*", s=110, color="#000000", label="untouched model", zorder=3)
    ax.margins(x=0.12, y=0.1)
    ax.set_ylim(bottom=0)
    percent(ax.xaxis)
    percent(ax.yaxis)
    ax.set_xlabel(f"{refusals} (n = {int(base[f'{refusals} n'])})")
    ax.set_ylabel(f"{asr} (n = {int(base[f'{asr} n'])})")
    ax.set_title("safety + utility neurons of the settings that no other dominates")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    widths = [100 * (table[f"{rate} high"] - table[f"{rate} low"]).max() for rate in (refusals, asr)]
    note(drawn, "95% Wilson intervals: at most {:.0f} points wide across, {:.0f} upwards".format(*widths), table)
    best = table[~table["dominated"] & (table["strength"] > 0)]
    labels = {  # settings at one place share a label
        place: ", ".join(dict.fromkeys(map(_label, rows.itertuples())))
        for place, rows in best.groupby([refusals, asr], sort=False)
    }
    place_labels(ax, table[[refusals, asr]].to_numpy(float), np.array(list(labels)), list(labels.values()))
    return drawn


@figure
def modulation_adaptation(table: pd.DataFrame) -> Figure:
    """Notebook 05: unseen attack classes before and after an inner step on a few of their prompts.

    Columns: method, attack, stage (before, after), metric, value, low, high, n.
    """
    metrics, methods, names = (ordered(table[c]) for c in ("metric", "method", "attack"))
    drawn, axes = panels(1, len(metrics), height=0.3 * len(names) * len(methods) / 2 + 1.4, sharey=True)
    step = 0.8 / (2 * len(methods))
    for ax, metric in zip(axes[0], metrics, strict=True):
        for i, method in enumerate(methods):
            for j, stage in enumerate(("before", "after")):
                rows = table[(table["metric"] == metric) & (table["method"] == method) & (table["stage"] == stage)]
                y = np.array([names.index(a) for a in rows["attack"]]) + step * (2 * i + j - len(methods) + 0.5)
                face = "white" if stage == "before" else COLOURS[i]
                interval(
                    ax, y, rows, COLOURS[i], horizontal=True, ms=4, capsize=1.5, mfc=face, label=f"{method}, {stage}"
                )
        rate_rows(ax, names, f"{metric}\n({counts(table[table['metric'] == metric])})")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(methods))
    note(drawn, "95% Wilson intervals", table)
    return drawn
