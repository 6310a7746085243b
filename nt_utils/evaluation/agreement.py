"""Agreement of judges with people on labelled answers: accuracy and Cohen's kappa on "refused or not".

    python -m nt_utils.evaluation.agreement FILE.csv --label final_label --refused 2_full_refusal 3_partial_refusal

What a judge does not judge is counted beside, and enters neither number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from nt_utils.data.records import Prompt
from nt_utils.data.tables import read_rows
from nt_utils.errors import InputError, command
from nt_utils.evaluation import metrics
from nt_utils.evaluation.judges import Judge

COLUMNS = ("set", "judge", "n", "not_judged", "accuracy", "kappa", "low", "high", "missed", "false")


class Labelled(NamedTuple):
    """Answers that people labelled: refused in whole or in part, or not."""

    name: str
    prompts: list[Prompt]
    responses: list[str]
    refused: list[bool]


def read_labelled(source: str | Path, *, prompt: str, response: str, label: str, refused: Sequence[str]) -> Labelled:
    """A table of labelled answers (any format of `data.tables`); its columns, and the labels that mean a refusal.

    Raises InputError naming a column that is missing, or a label that no row has.
    """
    rows = read_rows(Path(source))
    for column in (prompt, response, label):
        if column not in rows[0]:
            raise InputError(f"FILE: {source} has no column {column!r}; it has {', '.join(rows[0])}")
    labels = [row[label] for row in rows]
    if unknown := set(refused) - set(labels):
        raise InputError(f"--refused: no row is labelled {sorted(unknown)[0]!r}; labels are {sorted(set(labels))}")
    texts, responses = [Prompt(row[prompt]) for row in rows], [row[response] for row in rows]
    return Labelled(Path(source).stem, texts, responses, [found in refused for found in labels])


def agreement(labelled: Labelled, judge: Judge) -> tuple:
    """One row of COLUMNS: missed are refusals that it calls something else, false is what it calls a refusal wrongly."""
    verdicts = judge(labelled.prompts, labelled.responses)
    said = [None if metrics.is_missing(v) else v in ("refusal", "partial") for v in verdicts]
    pairs = [(t, s) for t, s in zip(labelled.refused, said, strict=True) if s is not None]
    accuracy = sum(t == s for t, s in pairs) / len(pairs) if pairs else float("nan")
    kappa = metrics.cohen_kappa(labelled.refused, said)
    wrong = [sum(t and not s for t, s in pairs), sum(s and not t for t, s in pairs)]
    return (labelled.name, judge.name, len(pairs), len(said) - len(pairs), accuracy, *kappa[:3], *wrong)


def agreement_table(sets: Sequence[Labelled], judges: Sequence[Judge]) -> pd.DataFrame:
    """Every judge on every set, columns COLUMNS."""
    return pd.DataFrame([agreement(one, judge) for one in sets for judge in judges], columns=list(COLUMNS))


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Accuracy and kappa of judges on answers that people labelled."""
    from nt_utils.evaluation.model_judge import find_judge

    parser = argparse.ArgumentParser(prog="python -m nt_utils.evaluation.agreement", description=main.__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.csv")
    parser.add_argument("--prompt", default="prompt", help="column of the requests")
    parser.add_argument("--response", default="completion", help="column of the answers")
    parser.add_argument("--label", default="label", help="column of the labels")
    parser.add_argument(
        "--refused", nargs="+", default=["refusal"], help="labels that mean a refusal, whole or in part"
    )
    parser.add_argument("--judge", nargs="+", default=["phrases"], help="judges by name (see model_judge.find_judge)")
    given = parser.parse_args(arguments)
    columns = {"prompt": given.prompt, "response": given.response, "label": given.label, "refused": given.refused}
    sets = [read_labelled(file, **columns) for file in given.files]
    print(agreement_table(sets, [find_judge(name) for name in given.judge]).round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
