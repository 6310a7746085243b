"""The findings ledger: every claim with its value, interval, n and seed, and a verdict that code computes.

A notebook states, before the value is known, which side of which margin the claim needs; the verdict follows from
the interval. ``make publish`` (``python -m nt_utils.study.ledger publish``) collects the runs' rows into
figures/findings.csv, copies the tables and figures that the README shows and writes the README's table of findings.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from nt_utils.errors import InputError, command

COLUMNS = [
    "claim",
    "paper",
    "section",
    "model",
    "statement",
    "value",
    "low",
    "high",
    "n",
    "seeds",
    "notebook",
    "verdict",
]
VERDICTS = ("holds", "does not hold", "undecided", "by construction", "not testable here")
BEGIN, END = "<!-- findings: begin -->", "<!-- findings: end -->"
#: What the README shows, from the first seed's run: figure or table name -> title.
SHOWN = {
    "figures/00_behaviour": "behaviour of the model under study",
    "figures/01_deactivation": "deactivating safety neurons against their controls",
    "figures/01_dose": "dose curve",
    "figures/01_where": "where the chosen neurons lie",
    "figures/01_languages": "overlap between languages",
    "figures/01_stability": "stability over prompt subsets",
    "figures/02_sn_steps": "tuning safety neurons and their controls, step by step",
    "figures/02_sn_equal": "what tuning costs at equal harmful score",
    "figures/02_sn_wrappers": "wrapper attacks before and after SN-Tune of the aligned model",
    "figures/06_agreement": "agreement of seven definitions",
    "figures/06_effects": "zeroing and amplifying equal numbers of neurons of each definition",
    "figures/06_effects_training": "training only, and freezing, the neurons of each definition",
    "figures/06_defences": "defences on equal footing",
    "figures/06_frontier": "safety against over-refusal",
    "figures/02_rsn_finetuning": "harmless fine-tuning after SN-Tune and RSN-Tune",
    "figures/05_modulation_arms": "NeuronTune against its baselines",
    "figures/05_modulation_frontier": "safety-utility frontier of the dial",
    "figures/05_modulation_ablations": "NeuronTune without one of its parts",
    "figures/05_modulation_adaptation": "meta-learning against joint training on unseen attacks",
    "figures/03_units_where": "where units of each category lie",
    "figures/03_units_pruning": "pruning each category against random units",
    "figures/03_units_growth": "growing each category until pruning costs",
    "figures/03_units_sensitivity": "categories by size of the calibration set",
    "figures/03_units_agreement": "categories by what they are made from",
    "figures/04_attack_curves": "fine-tuning with frozen units",
    "figures/04_attack_points": "frozen units at the worst case and at equal loss",
    "figures/04_unit_flow": "how units change category",
    "figures/04_align_budget": "aligning by some units only",
    "figures/04_direction": "leaning to refusal by layer",
    "figures/04_probe": "a probe of refusal by layer",
}


def verdict(low: float, high: float, *, above: float | None = None, below: float | None = None) -> str:
    """Whether an interval lies on the claimed side of the margin: holds, does not hold or undecided.

    Args:
        low, high: 95% interval of the value.
        above: the claim needs a value greater than this; or
        below: the claim needs a value less than this (exactly one of the two).
    """
    if (above is None) == (below is None):
        raise InputError("verdict: give exactly one of above and below, the margin the claim needs")
    if math.isnan(low) or math.isnan(high):
        return "not testable here"
    if above is not None:
        return "holds" if low > above else "does not hold" if high <= above else "undecided"
    assert below is not None
    return "holds" if high < below else "does not hold" if low >= below else "undecided"


def finding(
    *,
    claim: str,
    paper: str,
    section: str,
    model: str,
    statement: str,
    value: float,
    low: float,
    high: float,
    n: int,
    seeds: str,
    notebook: str,
    above: float | None = None,
    below: float | None = None,
    by_construction: bool = False,
    not_testable: bool = False,
) -> dict:
    """One row of the ledger.

    Args:
        claim: short stable name; paper and section: where it is made; statement: the claim in words, with its margin.
        value, low, high: what was measured and its 95% interval; n: what the interval is over.
        above, below: the margin, see :func:`verdict`.
        by_construction: the testbed's gate enforces it, so it is no finding.
        not_testable: this model or preset cannot show it.
    Raises:
        InputError: a row without interval or n.
    """
    if not_testable:
        decided = "not testable here"
        value = low = high = math.nan
    else:
        if any(v is None or math.isnan(v) for v in (value, low, high)) or not n:
            raise InputError(f"finding {claim}: needs a value, an interval and n; got {value}, [{low}, {high}], n={n}")
        decided = verdict(low, high, above=above, below=below)
        if by_construction:
            decided = "by construction"
    row = [claim, paper, section, model, statement, value, low, high, n, seeds, notebook, decided]
    return dict(zip(COLUMNS, row, strict=True))


def collect(folders: Sequence[Path]):
    """All findings of these run folders as one DataFrame, sorted; raises InputError naming a folder without any.

    A notebook's seeds must have been run with one version of the code; two notebooks need not.
    """
    import pandas as pd

    frames: list = []
    codes: dict[str, str] = {}
    for folder in folders:
        files = sorted((folder / "findings").glob("*.csv"))
        if not files:
            raise InputError(f"publish: no findings in {folder}; run the study first")
        for file in files:
            note = folder / "provenance" / f"{file.stem}.json"
            known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
            if not known.get("finished"):
                raise InputError(f"publish: {file} comes from a notebook that did not finish; run the study again")
            if codes.setdefault(file.stem, known.get("code", "")) != known.get("code", ""):
                raise InputError(
                    f"publish: the runs of {file.stem} were made by different versions of the code; run the study again"
                )
            frames.append(pd.read_csv(file, dtype={"seeds": str, "section": str}))
    table = pd.concat(frames, ignore_index=True)[COLUMNS]
    return table.sort_values(["notebook", "claim", "model", "seeds"], kind="stable", ignore_index=True)


def readme_table(findings) -> str:
    """Markdown of the README's findings: a folded table a notebook, a row a claim and model.

    A row has the mean over seeds with Student's t interval and how often each verdict fell; every seed stands in
    :func:`seeds_table`.
    """
    blocks = []
    for notebook, part in findings.groupby("notebook", sort=False):
        lines = [
            "| claim (paper) | model | n | mean over seeds [t interval] | verdicts, one a seed |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {where} | {model} | {n} | {_mean(rows['value'])} | {_tally(rows)} |"
            for where, model, n, rows in _claims(part)
        ]
        head = f"<details><summary><b>{notebook}</b>: {len(lines) - 2} claims: {_tally(part)}</summary>"
        blocks.append("\n".join([head, "", *lines, "", "</details>"]))
    return "\n".join(blocks)


def seeds_table(findings) -> str:
    """Markdown of all findings with every seed shown, as ``figures/findings.md`` holds it."""
    lines = [
        "# Findings, seed by seed",
        "",
        "Generated by `make publish` from findings.csv, which holds the same rows.",
        "",
    ]
    for notebook, part in findings.groupby("notebook", sort=False):
        lines += [
            f"## {notebook}",
            "",
            "| claim (paper) | model | n | seed: value [95% interval] verdict |",
            "|---|---|---|---|",
        ]
        for where, model, n, rows in _claims(part):
            lines.append(f"| {where} | {model} | {n} | {'<br>'.join(_cell(row) for row in rows.to_dict('records'))} |")
        lines.append("")
    return "\n".join(lines)


def _claims(findings):
    """(statement with its paper and section, model, range of n, the seeds' rows), one a claim and model."""
    for (_, model), rows in findings.groupby(["claim", "model"], sort=False):
        first = rows.iloc[0]
        where = " ".join(str(first[c]) for c in ("paper", "section") if first[c] == first[c])
        n = "-".join(str(v) for v in sorted({int(rows["n"].min()), int(rows["n"].max())}))
        yield f"{first['statement']} ({where})", model, n, rows


def _tally(rows) -> str:
    """ "holds 4, undecided 1", in the order of VERDICTS."""
    counts = rows["verdict"].value_counts()
    return ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS if verdict in counts)


def _mean(values) -> str:
    """Mean over seeds with Student's t interval; the value alone for one seed, a dash for none."""
    from nt_utils.evaluation.metrics import t_interval

    value, low, high, n = t_interval(values)
    if not n:
        return "-"
    return f"{value:.3g}" if n < 2 else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def _cell(row: Mapping) -> str:
    if row["verdict"] == "not testable here":
        return f"{row['seeds']}: not testable here"
    value, low, high = (f"{round(row[column], 3) + 0.0:g}" for column in ("value", "low", "high"))  # + 0.0: no "-0"
    return f"{row['seeds']}: {value} [{low}, {high}] **{row['verdict']}**"


def write_readme(readme: Path, findings) -> None:
    """Replace the text between the findings markers of the README."""
    from nt_utils.files import atomic

    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise InputError(f"{readme}: the markers {BEGIN} and {END} are missing")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    with atomic(readme) as tmp:
        tmp.write_text(f"{head}{BEGIN}\n{readme_table(findings)}\n{END}{tail}", encoding="utf-8")


def publish(folders: Sequence[Path], root: Path) -> None:
    """Collect findings and promote the shown figures of the first folder into ``root/figures``; update the README."""
    from nt_utils import plots
    from nt_utils.files import atomic

    findings = collect(folders)
    target = root / "figures"
    target.mkdir(exist_ok=True)
    with atomic(target / "findings.csv") as tmp:
        findings.to_csv(tmp, index=False, float_format="%.6g")
    with atomic(target / "findings.md") as tmp:
        tmp.write_text(seeds_table(findings), encoding="utf-8")
    for name in SHOWN:
        for suffix in (".csv", *plots.SUFFIXES):
            source = folders[0] / f"{name}{suffix}"
            if source.is_file():
                shutil.copyfile(source, target / source.name)
    write_readme(root / "README.md", findings)
    print(f"published {len(findings)} findings of {len(folders)} runs to {target}")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m nt_utils.study.ledger publish --studies testbed --seeds "0 1 2" --preset full``."""
    from nt_utils.files import project_root, run_folder, study_name
    from nt_utils.study import batch, parameters

    parser = argparse.ArgumentParser(prog="python -m nt_utils.study.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["publish"])
    parser.add_argument("--studies", default="testbed")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--preset", default="full", choices=parameters.PRESETS)
    options = parser.parse_args(arguments)
    folders = [
        run_folder("", study_name(study, study, options.preset), seed)
        for study in options.studies.replace(",", " ").split()
        for seed in batch.parse_seeds(options.seeds)
    ]
    publish(folders, project_root())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
