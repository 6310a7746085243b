"""Figures of notebook 06: agreement of the definitions, what their neurons do, defences side by side, seeds."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from nt_utils.plots.style import (
    COLOURS,
    GREY,
    NAMED,
    across,
    colours,
    counts,
    cross,
    curve,
    figure,
    interval,
    is_rate,
    legend,
    log_axis,
    note,
    ordered,
    panels,
    percent,
    place_labels,
    rate_rows,
    rates,
)

DRAWS = "several random draws: mean, smallest and largest"
CONTROLS = ("random", "foundation", "same importance")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _square(table: pd.DataFrame, names: list, column: str) -> pd.DataFrame:
    """A symmetric matrix from rows (a, b), its upper triangle empty."""
    grid = pd.DataFrame(np.nan, index=names, columns=names)
    for row in table.to_dict("records"):
        first, second = sorted((names.index(row["a"]), names.index(row["b"])))
        grid.iloc[second, first] = row[column]
    return grid


@figure
def agreement(table: pd.DataFrame) -> Figure:
    """Notebook 06: overlap of the sets and rank correlation of the scores, between halves of the calibration prompts.

    Columns a, b, share, jaccard, chance, spearman, n, prompts. One set size; the diagonal is one definition on both halves.
    """
    import seaborn as sns

    names = ordered(table["a"])
    drawn, axes = panels(1, 2, height=4.1, sharey=True)
    overlap, chance, ranks = (_square(table, names, c) for c in ("jaccard", "chance", "spearman"))
    words = overlap.map("{:.2f}".format, na_action="ignore") + chance.map("\n({:.2f})".format, na_action="ignore")
    style = {"annot_kws": {"size": 6.5}, "cbar": False, "linewidths": 0.6, "square": True}
    sns.heatmap(overlap, ax=axes[0, 0], cmap="cividis", vmin=0, vmax=1, annot=words.fillna(""), fmt="", **style)
    sns.heatmap(ranks, ax=axes[0, 1], cmap="vlag", vmin=-1, vmax=1, annot=True, fmt=".2f", **style)
    share, n, prompts = (table[c].iloc[0] for c in ("share", "n", "prompts"))
    axes[0, 0].set_title(f"Jaccard of the top {100 * share:g}%\n(in brackets: layer-matched chance)")
    axes[0, 1].set_title("rank correlation (Spearman)\nof the scores over the pool")
    note(
        drawn, f"means of {n} pairs of disjoint halves of {prompts} prompts; diagonal: a definition with itself", table
    )
    for ax in axes[0]:
        ax.grid(False)
        ax.tick_params(axis="x", rotation=40)
        for label in ax.get_xticklabels():
            label.set_ha("right")
    return drawn


@figure
def agreement_sizes(table: pd.DataFrame) -> Figure:
    """Notebook 06: overlap within a definition, between two, and by chance, against the size of the sets.

    Columns share, which, value.
    """
    drawn, axes = panels(height=2.5)
    ax = axes[0, 0]
    for which, colour in zip(ordered(table["which"]), (COLOURS[0], COLOURS[1], GREY), strict=False):
        rows = table[table["which"] == which]
        ax.plot(rows["share"], rows["value"], "o-" if colour != GREY else "o:", color=colour, ms=4, label=which)
    log_axis(ax, table["share"], lambda s: f"{100 * s:g}%")
    ax.set_ylim(0, 1)
    ax.set_xlabel("size of the sets, share of the pool")
    ax.set_ylabel("mean Jaccard")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


@figure
def agreement_sites(table: pd.DataFrame) -> Figure:
    """Notebook 06: where each definition's set lies, and rank agreement with the other definitions, by layer and projection.

    Columns definition, layer, kind, share, spearman.
    """
    import seaborn as sns

    names, layers = ordered(table["definition"]), table["layer"].nunique()
    drawn, axes = panels(2, 1, height=0.27 * 2 * len(names) + 1.6)
    places = table.assign(site=table["layer"].astype(str) + " " + table["kind"])
    columns = [f"{layer} {kind}" for kind in ordered(table["kind"]) for layer in range(layers)]
    small = layers <= 8
    for ax, column, title, more in (
        (axes[0, 0], "share", "share of the projection in the set, %", {"cmap": "cividis", "fmt": ".1f", "vmin": 0}),
        (
            axes[1, 0],
            "spearman",
            "mean rank correlation with the other definitions there (blank: constant scores)",
            {"cmap": "vlag", "fmt": ".2f", "vmin": -1, "vmax": 1},
        ),
    ):
        grid = places.pivot_table(index="definition", columns="site", values=column, sort=False, dropna=False)
        grid = grid.reindex(index=names, columns=columns) * (100 if column == "share" else 1)
        more |= {"xticklabels": 1 if small else layers // 6}  # of many layers every so many are named
        sns.heatmap(grid, ax=ax, annot=small, annot_kws={"size": 6.5}, cbar=not small, linewidths=0.4, **more)
        ax.set_title(title)
        ax.set_xlabel("layer and projection" if ax is axes[1, 0] else "")
        ax.set_ylabel("")
        ax.grid(False)
        ax.tick_params(axis="x", rotation=0)
    return drawn


@figure
def effects(table: pd.DataFrame) -> Figure:
    """Notebook 06: what is done to each definition's neurons, and to its controls, at equal counts.

    Columns intervention, definition, set, metric, value, low, high, n. One row of panels an intervention; dotted: no
    neurons chosen (for freezing: attacked with nothing frozen).
    """
    kinds = ordered(table["intervention"])
    width = max(table[table["intervention"] == k]["metric"].nunique() for k in kinds)
    heights = [0.24 * (table[table["intervention"] == k]["definition"].nunique() - 1) + 1.08 for k in kinds]
    drawn, axes = panels(len(kinds), width, height=sum(heights) + 0.45, ratios=heights, sharey="row")
    sets = ordered(table["set"])
    colours = dict(zip([s for s in sets if s != "chosen"], (GREY, COLOURS[4], COLOURS[5], COLOURS[3]), strict=False))
    handles: dict[str, Artist] = {}
    for line, kind in enumerate(kinds):
        part = table[table["intervention"] == kind]
        metrics, names = ordered(part["metric"]), [n for n in ordered(part["definition"]) if n != "untouched"]
        places = _places(part, names, sets)
        for column in range(width):
            ax = axes[line, column]
            if column >= len(metrics):
                ax.set_visible(False)
                continue
            rows = part[part["metric"] == metrics[column]]
            base = rows[rows["definition"] == "untouched"]["value"]
            if len(base):
                ax.axvline(float(base.iloc[0]), color="black", lw=0.9, ls=":")
            for name in sets:
                one = rows[(rows["set"] == name) & (rows["definition"] != "untouched")]
                if len(one):
                    y = [places[d, name] for d in one["definition"]]
                    size = 3 if name in CONTROLS else 4
                    interval(ax, y, one, colours.get(name, COLOURS[1]), True, ms=size, label=name)
            ax.set_xlim(-0.06, 1.06)
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50%", "", "100%"])
            ax.set_title(f"{kind}:\n{metrics[column]}\n({counts(rows)})", fontsize=8)
            rate_rows(ax, names, rates=False)
            found, labels = ax.get_legend_handles_labels()
            handles |= dict(zip(labels, found, strict=True))
    drawn.legend([handles[s] for s in sets], sets, loc="outside lower center", ncols=len(sets) + 1)
    note(drawn, f"95% intervals over topics; {DRAWS}; dotted: no neurons chosen", table)
    return drawn


def _places(part: pd.DataFrame, names: list[str], sets: list[str]) -> dict[tuple[str, str], float]:
    """(definition, set) -> height: the sets that a definition has lie around its line."""
    found: dict[tuple[str, str], float] = {}
    for i, name in enumerate(names):
        own = part[part["definition"] == name]["set"].unique()
        own = [s for s in sets if s in own]
        found |= {(name, s): i + 0.18 * (j - (len(own) - 1) / 2) for j, s in enumerate(own)}
    return found


@figure
def effects_training(table: pd.DataFrame) -> Figure:
    """Notebook 06: training only, or freezing, each definition's neurons; columns as :func:`effects`."""
    return effects(table)


@figure
def dose_definitions(table: pd.DataFrame) -> Figure:
    """Notebook 06: rates against the number of neurons zeroed, for every definition and for random neurons.

    Columns rule, share, neurons, metric, value, low, high, n.
    """
    drawn, parts = across(table, "metric", height=3.4, sharey=True)
    paint = colours(ordered(table["rule"]))
    for ax, metric, rows in parts:
        for i, (rule, colour) in enumerate(paint.items()):
            random = "random" in rule
            style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "ms": 4, "lw": 1.3, "label": rule}
            curve(ax, "neurons", rows[rows["rule"] == rule], colour, ":" if random else "-", band=0.2 * random, **style)
        log_axis(ax, rows["neurons"])
        rates(ax)
        ax.set_xlabel("neurons zeroed")
        ax.set_title(f"{metric} ({counts(rows)})")
    legend(drawn, 4)
    note(drawn, DRAWS, table)
    return drawn


@figure
def per_neuron(table: pd.DataFrame) -> Figure:
    """Notebook 06: which definition finds neurons that matter: their joint effect beyond random ones, and single hits.

    Columns measure, definition, value, low, high, n, chance.
    """
    names = ordered(table["definition"])
    drawn, parts = across(table, "measure", height=0.27 * len(names) + 1.2, sharey=True)
    for ax, measure, rows in parts:
        interval(ax, [names.index(d) for d in rows["definition"]], rows, COLOURS[0], horizontal=True)
        chance = rows["chance"].dropna()
        ax.axvline(float(chance.iloc[0]) if len(chance) else 0.0, color="black", lw=0.9, ls=":")
        ax.set_title(f"{measure}\n({counts(rows)})", fontsize=8)
        percent(ax.xaxis)
        rate_rows(ax, names, rates=False)
    note(drawn, "95% intervals over topics and draws (left) and of the share (right); dotted: chance", table)
    return drawn


#: Families of defences, in the order of every figure: what a name starts with -> its paper's colour.
FAMILIES = {
    "SN-Tune": COLOURS[0],
    "RSN-Tune": COLOURS[0],
    "RU budget": COLOURS[2],
    "freeze": COLOURS[2],
    "NeuronTune": COLOURS[1],
    "LoRA": GREY,
    "full": GREY,
    "refusal direction": NAMED["refusal direction"],
    "system prompt": NAMED["system prompt"],
}


def _family(name: str) -> int:
    """Position of a defence's family; "none" comes first."""
    return next((i for i, start in enumerate(FAMILIES) if name.startswith(start)), -1)


def _family_colour(name: str) -> str:
    return "#000000" if _family(name) < 0 else list(FAMILIES.values())[_family(name)]


@figure
def defences(table: pd.DataFrame) -> Figure:
    """Notebook 06: every defence as a difference from the model without one, before (top) and after fine-tuning (below).

    Columns defence, metric, value, low, high, n; the first defence is none. A metric "<label> after <attack>" stands below.
    Defences stand by paper, each paper in its colour.
    """
    metrics = ordered(table["metric"])
    none = ordered(table["defence"])[0]
    names = sorted((n for n in ordered(table["defence"]) if n != none), key=_family)
    rows_of = [[m for m in metrics if " after " not in m], [m for m in metrics if " after " in m]]
    rows_of = [row for row in rows_of if row]
    drawn, axes = panels(
        len(rows_of), max(map(len, rows_of)), height=(0.17 * len(names) + 0.9) * len(rows_of), sharey=True
    )
    for line, shown in zip(axes, rows_of, strict=True):
        for ax in line[len(shown) :]:
            ax.set_visible(False)
        for ax, metric in zip(line, shown, strict=False):
            rows = table[table["metric"] == metric].set_index("defence")
            base = float(rows.loc[none, "value"])
            for i, name in enumerate(names):
                if name in rows.index:
                    moved = rows.loc[[name], ["value", "low", "high"]] - base
                    interval(ax, [i], moved, _family_colour(name), horizontal=True, ms=3.5)
            ax.axvline(0, color="black", lw=0.9)
            unit = f"none {base:.3g}" if not is_rate(metric) else f"none {100 * base:.0f}%"
            ax.set_title(f"{textwrap.fill(metric, 17)}\n({unit},\n{counts(rows)})".replace(" = ", "="), fontsize=7)
            ax.set_yticks(range(len(names)), names, fontsize=7)
            ax.set_ylim(len(names) - 0.4, -0.6)
            ax.tick_params(axis="x", labelsize=7)
            if is_rate(metric):
                ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:+.0f}" if v else "0")
    note(drawn, "difference from no defence, in points; bars: the rate's own 95% interval; one colour a paper", table)
    return drawn


@figure
def frontier(table: pd.DataFrame) -> Figure:
    """Notebook 06: safety against its price for every defence, both with intervals; the lower left is best.

    Columns panel, defence, x_label, y_label, x, x_low, x_high, value, low, high, n, useful. Dotted lines: no defence. Pale:
    the defended model has lost its usefulness, so that its safety is worth nothing.
    """
    drawn, parts = across(table, "panel", height=4.4)
    for ax, _, rows in parts:
        for row in rows.to_dict("records"):
            sides = ([row[name] for name in names] for names in (("x", "x_low", "x_high"), ("value", "low", "high")))
            colour, pale = _family_colour(row["defence"]), 1.0 if row["useful"] else 0.3
            if _family(row["defence"]) < 0:
                ax.axvline(row["x"], color="black", lw=0.9, ls=":")
                ax.axhline(row["value"], color="black", lw=0.9, ls=":")
            cross(ax, *sides, color=colour, lw=0.7, alpha=0.3 * pale)
            ax.plot(row["x"], row["value"], "o", color=colour, ms=5.5, alpha=pale)
        percent(ax.xaxis)
        percent(ax.yaxis)
        ax.set_xlim(left=min(0.0, *ax.get_xlim()))
        ax.set_xlabel(rows["x_label"].iloc[0])
        ax.set_ylabel(textwrap.fill(rows["y_label"].iloc[0], 34))
        ax.set_title(counts(rows))
    note(drawn, "95% intervals; dotted: no defence; pale: the model has lost its usefulness; one colour a paper", table)
    for ax, _, rows in parts:
        places = {place: ",\n".join(part["defence"]) for place, part in rows.groupby(["x", "value"], sort=False)}
        place_labels(ax, rows[["x", "value"]].to_numpy(float), np.array(list(places)), list(places.values()), size=6.5)
    return drawn
