"""Figures of notebook 05: where the modulated neurons lie, how alpha is learnt, what it does, and the dial."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nt_utils.plots.style import (
    COLOURS,
    GREY,
    across,
    counts,
    cross,
    figure,
    interval,
    is_rate,
    layer_maps,
    legend,
    note,
    ordered,
    panels,
    percent,
    place_labels,
    rate_rows,
)

GROUPS = {"none": "#000000", "chosen": COLOURS[1], "control": COLOURS[0]}


@figure
def modulation_spread(table: pd.DataFrame) -> Figure:
    """Notebook 05: share of each projection's neurons that are modulated. Columns: role, layer, kind, count, share."""

    def title(role: str, rows: pd.DataFrame) -> str:
        return f"{role} neurons ({int(rows['count'].sum())})"

    return layer_maps(table, "role", "kind", "modulated, % of the projection", title)


@figure
def modulation_learning(table: pd.DataFrame) -> Figure:
    """Notebook 05: losses over the outer steps. Columns: method, iteration, loss, value (nats a token)."""
    styles = {"outer loss": "-", "support": "o", "support, adapted": "v", "validation": "s--"}
    drawn, parts = across(table, "method", height=2.7, sharey=True)
    for ax, method, rows in parts:
        for i, (name, style) in enumerate(styles.items()):
            part = rows[rows["loss"] == name]
            if len(part):
                ax.plot(part["iteration"], part["value"], style, color=COLOURS[i], ms=4, label=name)
        ax.set_title(method)
        ax.set_xlabel("outer step")
    parts[0][0].set_ylabel("loss, nats a token")
    parts[0][0].set_ylim(bottom=0)
    legend(drawn, table["loss"].nunique())
    return drawn


@figure
def modulation_arms(table: pd.DataFrame) -> Figure:
    """Notebook 05: every arm on every rate. Columns: arm, group (none, chosen, control), metric, value, low, high, n.

    Dotted: the untouched model. Random arms: mean of the draws, from the smallest to the largest.
    """
    arms, rows = ordered(table["arm"]), -(-table["metric"].nunique() // 3)
    drawn, parts = across(table, "metric", rows * (0.19 * len(arms) + 0.75), most=3, sharey=True)
    for ax, metric, part in parts:
        base = part.loc[part["group"] == "none", "value"]
        if len(base):
            ax.axvline(float(base.iloc[0]), color=GREY, lw=0.8, ls=":")
        for group, some in part.groupby("group", sort=False):
            y = [arms.index(a) for a in some["arm"]]
            interval(ax, y, some, GROUPS.get(str(group), GREY), horizontal=True, ms=3.5, capsize=1.8)
        rate_rows(ax, arms, f"{metric}\n({counts(part)})", is_rate(metric))
    draws = "; of a mean of draws: the smallest and the largest" if any(", mean of" in arm for arm in arms) else ""
    note(drawn, f"95% intervals{draws}; dotted: the untouched model", table)
    return drawn


@figure
def modulation_ablations(table: pd.DataFrame) -> Figure:
    """Notebook 05: NeuronTune without one of its parts. Columns as in ``modulation_arms``."""
    return modulation_arms(table)


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
        sns.heatmap(
            grid, ax=ax, cmap="cividis", vmin=0, vmax=100, annot=True, fmt=".0f", annot_kws={"size": 8}, cbar=False
        )
        ax.invert_yaxis()
        ax.set_title(f"{name}, %\n(n = {int(base[f'{name} n'])})")
        ax.set_xlabel("utility neurons")
        ax.set_ylabel("safety neurons" if ax is axes[0, 0] else "")
        ax.tick_params(axis="y", rotation=0)
    return drawn


@figure
def modulation_frontier(table: pd.DataFrame) -> Figure:
    """Notebook 05: every setting of the dial, attack success against over-refusal, the larger the more useful.

    Columns as in ``modulation_dial``, ``dominated``: another setting is as good in ASR, over-refusal and utility and
    better in one (hollow).
    """
    asr, refusals, useful = [c.removesuffix(" n") for c in table.columns if c.endswith(" n")][:3]
    drawn, axes = panels(height=3.9)
    ax = axes[0, 0]
    strengths = sorted(s for s in table["strength"].unique() if s)
    sizes = 8 + 90 * (table[useful] / max(float(table[useful].max()), 1e-9)) ** 2
    for i, row in table.iterrows():
        turned = row["strength"] > 0
        colour = COLOURS[strengths.index(row["strength"])] if turned else "#000000"
        sides = ([row[name], row[f"{name} low"], row[f"{name} high"]] for name in (refusals, asr))
        cross(ax, *sides, color=colour, lw=0.6, alpha=0.25)
        face = "white" if turned and row["dominated"] else colour
        ax.scatter(row[refusals], row[asr], s=sizes[i], facecolor=face, edgecolor=colour, zorder=3, clip_on=False)
    for i, strength in enumerate(strengths):
        ax.scatter([], [], s=40, color=COLOURS[i], label=f"strength {strength:g}")
    ax.scatter([], [], s=40, color="#000000", label="untouched model")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    percent(ax.xaxis)
    percent(ax.yaxis)
    base = table.iloc[0]
    ax.set_xlabel(f"{refusals} (n = {int(base[f'{refusals} n'])})")
    ax.set_ylabel(f"{asr} (n = {int(base[f'{asr} n'])})")
    ax.set_title("labels: safety + utility neurons of the settings that no other dominates")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    note(drawn, f"crosses: 95% intervals; area: {useful}; hollow: dominated by another setting", table)
    best = table[~table["dominated"] & (table["strength"] > 0)]
    numbers = best["n_safety"].astype(int).astype(str) + "+" + best["n_utility"].astype(int).astype(str)
    places = best.assign(label=numbers).groupby([refusals, asr], sort=False)["label"]
    labels = {place: ", ".join(ordered(own)) for place, own in places}  # settings at one place share a label
    place_labels(ax, table[[refusals, asr]].to_numpy(float), np.array(list(labels)), list(labels.values()))
    return drawn


@figure
def modulation_adaptation(table: pd.DataFrame) -> Figure:
    """Notebook 05: what an inner step on a few prompts of an unseen attack class changes, each class and the mean.

    Columns: method, attack, stage (before, after), metric, value, low, high, n.
    """
    methods, names = ordered(table["method"]), ordered(table["attack"])
    drawn, parts = across(table, "metric", height=0.32 * (len(names) + 1) + 1.5, sharey=True)
    for ax, metric, own in parts:
        rows = own.pivot_table(index=["method", "attack"], columns="stage", values="value", sort=False)
        change = rows["after"] - rows["before"]
        for i, method in enumerate(methods):
            each = change[method].reindex(names)
            y = np.arange(len(names)) + 0.22 * (i - (len(methods) - 1) / 2)
            ax.plot(each, y, "o", color=COLOURS[i], ms=4, mfc="white", label=method)
            middle, spread = float(each.mean()), float(each.std(ddof=1)) if len(each) > 1 else 0.0
            error = spread / np.sqrt(max(len(each), 1))
            at = len(names) + 0.22 * (i - (len(methods) - 1) / 2)
            ax.errorbar(middle, at, xerr=error, fmt="o", color=COLOURS[i], ms=5.5, capsize=2.5, elinewidth=1.1)
        ax.axvline(0, color="black", lw=0.9)
        rate_rows(ax, [*names, "mean of the classes"], f"{metric}\n({counts(own)})", False)
        ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:+.3g}" if v else "0")
        ax.set_xlabel("change by the inner step, points")
    legend(drawn, len(methods))
    note(drawn, "open: one unseen attack class; filled: mean over the classes with its standard error", table)
    return drawn
