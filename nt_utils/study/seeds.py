"""One study over its seeds: what every seed found, and t intervals over them.

``python -m nt_utils.study.seeds --folder testbed --seeds "0 1 2"`` (the last step of ``make study``) reads finished runs of one
model and writes ``runs/<study>/comparison/``: claims.csv, the ledger of these seeds, and the figures of notebook 06 with their
values averaged over seeds. A run's own tables never depend on which other seeds are there. Runs of different models, settings
or code are not mixed. A bootstrap of three seeds covers 84%, so intervals are Student's t.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from nt_utils.errors import InputError, command
from nt_utils.evaluation.metrics import t_interval
from nt_utils.files import run_folder
from nt_utils.study import ledger
from nt_utils.study.provenance import notes

if TYPE_CHECKING:
    from nt_utils.study.run import Run

#: Parameters that may differ between the runs that are compared.
FREE = {"seed", "runs"}
#: Tables of a run that are averaged over seeds: name -> what identifies a row. Their figures are drawn anew.
TABLES = {
    "06_agreement": ["a", "b", "share"],
    "06_effects": ["intervention", "definition", "set", "metric"],
    "06_effects_training": ["intervention", "definition", "set", "metric"],
    "06_dose_definitions": ["rule", "share", "neurons", "metric"],
    "06_per_neuron": ["measure", "definition"],
    "06_defences": ["defence", "metric"],
}


def check_same(folders: Sequence[Path]) -> None:
    """Raise InputError naming the difference unless the runs have one model, the same settings and the same code."""
    first: dict[str, dict] = {}
    for folder in folders:
        for notebook, found in notes(folder).items():
            known = first.setdefault(notebook, found)
            for name, value in sorted(found.get("parameters", {}).items()):
                other = known["parameters"].get(name)
                if name not in FREE and value != other:
                    raise InputError(f"{folder}: {notebook} ran with {name} = {value!r}, another seed with {other!r}")
            if found.get("code") != known.get("code"):
                raise InputError(
                    f"{folder}: {notebook} was made by other code than another seed's; run the study again for both"
                )


def missing(folders: Sequence[Path]) -> list[str]:
    """What is not there or not finished: one line a run, with the command that makes it."""
    known = {folder: notes(folder) for folder in folders}
    names = {name for found in known.values() for name in found}
    lines = []
    for folder, found in known.items():
        done = {name for name, note in found.items() if note.get("finished")}
        if not done or names - done:
            command = _command(folder.parent.name, folder.name.removeprefix("seed-"))
            lines.append(f"{folder}: {', '.join(sorted(names - done)) or 'everything'} is missing; {command}")
    return lines


def _command(study: str, seed: str) -> str:
    name, _, preset = study.rpartition("-")
    if not name or preset not in ("quick", "full"):
        name, preset = study, "default"
    return f'make study STUDY={name} SEEDS="{seed}" PRESET={preset}'


def table_over_seeds(tables: Sequence[pd.DataFrame], keys: Sequence[str]) -> pd.DataFrame:
    """Rows with the same keys averaged over seeds: every number its mean; low, high the t interval of ``value``; n the seeds.

    For one table its own rows. The order is the first table's; a column ``interval`` says what the limits are.
    """
    if len(tables) == 1:
        return tables[0]
    whole = pd.concat([t.assign(_seed=i) for i, t in enumerate(tables)], ignore_index=True)
    rows = []
    for key, part in whole.groupby(list(keys), sort=False):
        row = part.iloc[0].drop("_seed").to_dict()
        row |= {c: part[c].mean() for c in row if c not in keys and pd.api.types.is_numeric_dtype(whole[c])}
        column = "value" if "value" in part else "jaccard"
        row[column], row["low"], row["high"], row["n"] = t_interval(part[column])
        rows.append(row | dict(zip(keys, key, strict=True)))
    found = pd.DataFrame(rows, columns=list(tables[0].columns)).assign(interval="means with 95% t intervals over seeds")
    return found[found["low"].notna()] if "low" in found else found


def aggregate(folders: Sequence[Path]) -> Path:
    """Write ``<study>/comparison/`` for the runs of one study; the runs must be complete and alike.

    Raises InputError: a run that is missing or not finished (lists all, with the commands), or runs that differ.
    """
    from nt_utils import plots

    gaps = missing(folders)
    if gaps:
        raise InputError("these runs are not complete:\n" + "\n".join(gaps))
    check_same(folders)
    target = folders[0].parent / "comparison"
    target.mkdir(exist_ok=True)
    ledger.write_table(target / "claims.csv", ledger.frame(ledger.collect(folders).to_dict("records")))
    for name, keys in TABLES.items():
        files = [folder / "figures" / f"{name}.csv" for folder in folders]
        if not all(file.is_file() for file in files):
            continue
        table = table_over_seeds([pd.read_csv(file) for file in files], keys)
        path = ledger.write_table(target / f"{name}.csv", table)
        plots.draw(path, pictures=(".png",) if plots.is_quick(path) else plots.PICTURES)
    return target


def shown(run: Run) -> pd.DataFrame:
    """The verdicts over this run and the finished ones beside it, for display in notebook 06: never saved in a run.

    Says what is missing, and when there is one seed alone. Of the run's own notebook it shows what was handed in so far:
    its file of claims is from a run before, if there is one.
    """
    folder = run.folder
    siblings = sorted(p for p in folder.parent.glob("seed-*") if (p / "claims").is_dir())
    try:
        check_same(siblings)
    except InputError as error:
        print(f"not compared: {error}")
        siblings = [folder]
    if len(siblings) < 2:
        print(f"one seed alone; others: {_command(folder.parent.name, '0 1 2')}")
    for line in missing([s for s in siblings if s != folder]):
        print(line)
    lines = ledger.run_rows(run)
    for sibling in siblings:
        finished = {name for name, note in notes(sibling).items() if note.get("finished")}
        finished -= {run.notebook} if sibling == folder else set()
        for name in sorted(finished):
            file = sibling / "claims" / f"{name}.csv"
            lines += ledger.read(file).to_dict("records") if file.is_file() else []
    return ledger.frame(lines)["claim row statement verdict corrected part value low high each".split()]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    from nt_utils.study import batch

    parser = argparse.ArgumentParser(prog="python -m nt_utils.study.seeds", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="testbed", help="the study's folder under runs/, such as testbed-full")
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args(arguments)
    folders = [run_folder("", options.folder, seed) for seed in batch.parse_seeds(options.seeds)]
    print(f"{len(folders)} seed{'s' if len(folders) > 1 else ' alone'}: {aggregate(folders)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
