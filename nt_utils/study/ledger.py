"""The ledger: what every run handed in for the thirty claims, the verdicts over seeds, and the tables that show them.

A run writes ``claims/<notebook>.csv``, one line a part of a claim's row (COLUMNS). Here these lines are collected, pooled
over seeds by Student's t, and decided by :mod:`nt_utils.study.claims`. A testbed seed that misses its gate is left out of the
pooled verdict, and counted; a seed that cannot test a claim is counted, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nt_utils.errors import InputError
from nt_utils.evaluation.metrics import Interval, pooled
from nt_utils.files import atomic, escaped
from nt_utils.study import claims
from nt_utils.study.provenance import EDITED, notes

if TYPE_CHECKING:
    import pandas as pd

    from nt_utils.study.run import Run

COLUMNS = tuple("claim row part model seed value low high n freedom reason notebook weights gate".split())
#: Columns of the ledger, one line a claim's row and model.
LEDGER = tuple(
    "claim row statement paper section figure model positive_control verdict corrected part value low high n seeds each "
    "untestable missed_gate reason notebook weights".split()
)
#: Columns that a notebook shows of its own claims.
NOTEBOOK_COLUMNS = ("claim", "row", "statement", "part", "value", "low", "high", "n", "verdict", "reason")
MOST_ROWS = 60  # of one subject


# ---------------------------------------------------------------------------------------------------- of one run


def run_rows(run: Run) -> list[dict[str, Any]]:
    """What a run handed in: one line a part, and one line for every row of which nothing was handed in."""
    mark = " (quick)" if run.is_quick else ""
    testbed = run.facts.get("testbed", {})
    same = {
        "model": run.label + mark,
        "seed": run.parameters.seed,
        "notebook": run.notebook,
        "weights": run.facts.get("model weights", ""),
        "gate": {True: "passed", False: "missed"}.get(testbed.get("passed"), ""),
    }
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0, "freedom": math.nan, "reason": ""}
    lines = []
    for what, row in claims.rows(run.notebook):
        parts = [p.name for p in what.parts if (what.id, row, p.name) in run.handed_in]
        for part in parts or [""]:
            found = run.handed_in.get((what.id, row, part), {})
            lines.append({"claim": what.id, "row": row, "part": part, **nothing, **same, **found})
    return lines


def collect(folders: Sequence[Path]) -> pd.DataFrame:
    """The lines of these run folders.

    Raises InputError: a folder without any, a notebook that did not finish, seeds of a notebook made by different code, two
    runs of one model, seed and notebook.
    """
    import pandas as pd

    frames: list = []
    codes: dict[tuple[str, str], str] = {}
    for folder in folders:
        files = sorted((folder / "claims").glob("*.csv"))
        if not files:
            raise InputError(f"publish: no claims in {folder}; run the study first")
        for file in files:
            known = notes(folder).get(file.stem, {})
            if not known.get("finished"):
                raise InputError(f"publish: {file} comes from a notebook that did not finish; run the study again")
            code = known.get("code", "")
            if code.endswith(EDITED):
                raise InputError(f"publish: the code was edited while {file} was made; run the study again")
            if codes.setdefault((folder.parent.name, file.stem), code) != code:
                raise InputError(
                    f"publish: the runs of {file.stem} were made by different versions of the code; run the study again"
                )
            frames.append(read(file))
    lines = pd.concat(frames, ignore_index=True)
    twice = lines[lines.duplicated(["claim", "row", "part", "model", "seed"])]
    if len(twice):
        first = twice.iloc[0]
        raise InputError(
            f"publish: {first['model']}, seed {first['seed']}, {first['notebook']} was run in two of these folders; name one"
        )
    return lines


def write_table(path: Path, frame: pd.DataFrame, digits: str | None = "%.6g") -> Path:
    """Save a table as CSV, whole or not at all; ``digits`` is the format of its numbers."""
    with atomic(path) as tmp:
        frame.to_csv(tmp, index=False, float_format=digits)
    return path


def read(file: Path) -> pd.DataFrame:
    """One file of a run's claims. Raises InputError for one of a version with other columns."""
    import pandas as pd

    words = dict.fromkeys(("row", "part", "model", "reason", "weights", "gate"), str)
    empty = {c: [""] for c in ("value", "low", "high", "freedom")}
    found = pd.read_csv(file, dtype=words, keep_default_na=False, na_values=empty)
    if set(COLUMNS) - set(found):
        raise InputError(f"publish: {file} was written by an older version; run the study again")
    return found


# ------------------------------------------------------------------------------------------------------ verdicts


def verdicts(lines: Iterable[Mapping[str, Any]], notebook: str = "") -> list[dict[str, Any]]:
    """The ledger: one line a claim's row and model, over all seeds that the lines come from.

    Args:
        lines: as :func:`run_rows` gives them, of one or more models and seeds.
        notebook: only this notebook's claims.
    """
    lines = list(lines)
    found = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        part = [_line(what, row, model, own) for what, row in claims.rows(notebook)]
        decided = claims.corrected(verdict for verdict, _ in part)
        found += [entry | {"corrected": word} for (_, entry), word in zip(part, decided, strict=True)]
    return found


def _line(
    what: claims.Claim, row: str, model: str, lines: list[Mapping[str, Any]]
) -> tuple[claims.Verdict, dict[str, Any]]:
    """One row of one claim for one model: its verdict over seeds, and the ledger's line."""
    own = [line for line in lines if (line["claim"], line["row"]) == (what.id, row)]
    by_seed = _by_seed(own)
    missed = [s for s in by_seed if any(line["gate"] == "missed" for line in own if line["seed"] == s)]
    kept = {seed: parts for seed, parts in by_seed.items() if seed not in missed}
    needed = _by_seed(line for line in lines if (line["claim"], line["row"]) == (what.requires, row))
    each = {seed: _verdict(what, {seed: parts}, needed, model) for seed, parts in by_seed.items()}
    verdict = _verdict(what, kept, needed, model)
    if missed and not kept:
        verdict = claims.Verdict(claims.NOT_TESTABLE, reason="every seed of the testbed misses its gate")
    said = "; ".join(f"{seed}: {_cell(what, v)}" + " (missed its gate)" * (seed in missed) for seed, v in each.items())
    entry = {
        **{name: getattr(what, name) for name in ("statement", "paper", "section", "figure", "notebook")},
        **{"claim": what.id, "row": row, "model": model, "positive_control": claims.is_positive_control(model)},
        **{"verdict": verdict.verdict, "part": verdict.part, "reason": verdict.reason, **verdict.interval._asdict()},
        **{"seeds": len(kept), "each": said, "missed_gate": len(missed)},
        "untestable": sum(v.verdict == claims.NOT_TESTABLE for s, v in each.items() if s in kept),
        "weights": " ".join(dict.fromkeys(line["weights"] for line in own if line["weights"])),
    }
    return verdict, entry


def _by_seed(lines: Iterable[Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """seed -> part -> interval or reason."""
    lines = list(lines)
    return {
        seed: _measured([line for line in lines if line["seed"] == seed])
        for seed in dict.fromkeys(line["seed"] for line in lines)
    }


def _verdict(
    what: claims.Claim, seeds: Mapping[Any, Mapping[str, Any]], needed: Mapping[Any, Mapping[str, Any]], model: str
) -> claims.Verdict:
    """The verdict over these seeds; a claim says nothing where what it requires is not shown over the same seeds."""
    if what.requires:
        first = claims.claim(what.requires)
        found = _pooled(first, {seed: needed[seed] for seed in seeds if seed in needed}, model)
        if found.verdict not in (claims.HOLDS, claims.NOT_RUN):
            why = f"what it rests on ({first.id}) is not shown: {found.verdict}"
            seeds = {
                seed: {name: measured if isinstance(measured, str) else why for name, measured in parts.items()}
                for seed, parts in seeds.items()
            }
    return _pooled(what, seeds, model)


def _measured(lines: list[Mapping[str, Any]]) -> dict[str, Any]:
    """part -> interval or reason, of one seed."""
    return {
        line["part"]: line["reason"]
        or Interval(line["value"], line["low"], line["high"], int(line["n"]), line["freedom"])
        for line in lines
        if line["part"]
    }


def _pooled(what: claims.Claim, seeds: Mapping[Any, Mapping[str, Any]], model: str) -> claims.Verdict:
    """One verdict over seeds: of each part the interval over the seeds that measured it; one seed has its own interval.

    A part whose training diverged at a seed has no verdict: seeds that failed are not left out of what succeeded.
    """
    measured: dict[str, Any] = {}
    for part in what.parts:
        found = [parts[part.name] for parts in seeds.values() if part.name in parts]
        values = [f for f in found if not isinstance(f, str)]
        lost = [f for f in found if isinstance(f, str) and "diverged" in f]
        if lost and values:
            measured[part.name] = f"at {len(lost)} of {len(found)} seeds: {lost[0]}"
        elif len(values) > 1:
            measured[part.name] = pooled(values)
        elif found:
            measured[part.name] = values[0] if values else found[0]
    return claims.decide(what.id, measured, model)


def frame(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The ledger as a table, at most MOST_ROWS rows a model."""
    import pandas as pd

    return pd.DataFrame(verdicts(lines), columns=list(LEDGER))


# -------------------------------------------------------------------------------------------------------- tables


def _cell(what: claims.Claim, verdict: claims.Verdict) -> str:
    """ "holds 45 [40, 50] (utility)": with the part that decides it, where there are several."""
    if not verdict.part or math.isnan(verdict.interval.value):
        return verdict.verdict
    name = f" ({verdict.part})" if len(what.parts) > 1 else ""
    return f"{verdict.verdict} {what.part(verdict.part).text(verdict.interval)}{name}"


def shown_value(line: Mapping[str, Any]) -> str:
    """ "45 [40, 50]", the quantity that decides a ledger's line; "" where none does."""
    if not line["part"] or math.isnan(line["value"]):
        return ""
    return claims.claim(line["claim"]).part(line["part"]).text([line[name] for name in Interval._fields])


def cell(line: Mapping[str, Any]) -> str:
    """A ledger's line as the front page shows it: verdict, value with interval, and its quantity where there are several."""
    what = claims.claim(line["claim"])
    if line["verdict"] in (claims.NOT_TESTABLE, claims.NOT_RUN):
        return line["verdict"]
    name = f" ({line['part']})" if len(what.parts) > 1 else ""
    sure = line["corrected"] == line["verdict"] != claims.UNDECIDED
    word = f"**{line['verdict']}**" if sure else line["verdict"]
    tested = line["seeds"] - line["untestable"]
    seeds = f", {tested} of {line['seeds']} seeds" if line["untestable"] else ""
    return f"{word} {shown_value(line)}{name}{seeds}"


#: What a stranger asks first; the README opens with these claims.
FRONT_CLAIMS = ("S1", "S2", "S6", "A2", "N2")


def front_page(ledger: pd.DataFrame, ids: Sequence[str] = ()) -> str:
    """Claims in Markdown (all thirty, or those named): a row a claim, the paper's figure, and a column a model, controls last.

    Where claims are named, a last column says where each is measured, and a model that ran less than half of them has none.
    """
    models = sorted(dict.fromkeys(ledger["model"]), key=claims.is_positive_control)
    if ids:
        ran = ledger[ledger["claim"].isin(ids) & (ledger["verdict"] != claims.NOT_RUN)]
        models = [m for m in models if 2 * ran.loc[ran["model"] == m, "claim"].nunique() >= len(ids)]
    heads = [escaped(m) + (" (positive control)" if claims.is_positive_control(m) else "") for m in models]
    heads += ["notebook"] if ids else []
    lines = ["| | claim | paper's figure | " + " | ".join(heads) + " |", "|---" * (3 + len(heads)) + "|"]
    known = {(line["model"], line["claim"], line["row"]): line for line in ledger.to_dict("records")}
    for what in [claims.claim(i) for i in ids] or claims.CLAIMS:
        cells = []
        for model in models:
            own = [(row, known.get((model, what.id, row))) for row in what.rows]
            told = [(f"{row}: " if row else "") + (cell(line) if line else claims.NOT_RUN) for row, line in own]
            same = {t.split(": ")[-1] for t in told}
            cells.append(same.pop() if len(same) == 1 and len(told) > 1 else "<br>".join(told))
        cells += [f"[{what.notebook[:2]}](notebooks/{what.notebook}.ipynb)"] if ids else []
        lines.append(
            f"| {what.id} | {escaped(what.statement)} ({what.paper}) | {escaped(what.figure)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def counts(ledger: pd.DataFrame) -> str:
    """One sentence a model: how many rows hold after the correction. Positive controls are named as such, not counted."""
    said = []
    for model, part in ledger.groupby("model", sort=False):
        if claims.is_positive_control(str(model)):
            continue
        number = part["corrected"].value_counts()
        told = ", ".join(f"{word} {number[word]}" for word in claims.VERDICTS if word in number)
        said.append(
            f"{escaped(model)}, {len(part)} rows (a claim has one for each rule, language or defence), verdicts after Holm's correction: {told}."
        )
    return " ".join(said)


def details(ledger: pd.DataFrame) -> str:
    """Every row of every claim in Markdown: the quantity that decides, its interval, seeds and verdicts."""
    lines = []
    for what in claims.CLAIMS:
        lines += [f"## {what.id}. {escaped(what.statement)}", ""]
        place = f", section {what.section}" if what.section else ""
        lines += [
            f"{what.paper}{place}; the paper's figure: {escaped(what.figure) or '-'}; notebook {what.notebook}.",
            "",
        ]
        for part in what.parts:
            side = f"above {part.above:g}" if part.above is not None else f"below {part.below:g}"
            lines.append(f"- *{part.name}*: {part.quantity}; {side}")
        lines += [
            "",
            "| row | model | verdict | after Holm | decided by | value [95%] | n | seeds | each seed |",
            "|---" * 9 + "|",
        ]
        for line in ledger[ledger["claim"] == what.id].to_dict("records"):
            seeds = f"{line['seeds']}" + f", {line['untestable']} untestable" * bool(line["untestable"])
            seeds += f", {line['missed_gate']} missed the gate" * bool(line["missed_gate"])
            told = line["verdict"] + (f": {escaped(line['reason'])}" if line["reason"] else "")
            cells = [line["row"], escaped(line["model"]), told, line["corrected"], line["part"], shown_value(line)]
            cells += [str(line["n"] or ""), seeds, escaped(line["each"])]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- prose

_ID = re.compile(r"\b[SANX]\d{1,2}\b")
_NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+)?(?![\w]|\.\d)")


def unsupported(text: str, ledger: pd.DataFrame) -> list[str]:
    """Numbers of the findings' prose that the ledger does not hold, each with its sentence.

    A sentence that has a number names claims by id; the number must stand in one of these claims' rows (value, limits,
    n, seeds), in the paper's figure or in the statement, as it is printed there or rounded to whole points.
    """
    found = []
    for sentence in re.split(r"(?<=[.!?;])\s+|\n+", text):
        numbers = _NUMBER.findall(_ID.sub("", sentence))
        if not numbers:
            continue
        allowed: set[str] = set()
        for name in set(_ID.findall(sentence)) & set(claims.BY_ID):
            allowed |= _numbers_of(name, ledger[ledger["claim"] == name].to_dict("records"))
        found += [f"{n}: {sentence.strip()}" for n in numbers if _plain(n) not in allowed]
    return found


def _plain(number: str) -> str:
    return f"{abs(float(number.replace('−', '-'))):g}"


def _numbers_of(name: str, lines: list[dict[str, Any]]) -> set[str]:
    what = claims.claim(name)
    texts = [what.statement, what.figure]
    for line in lines:
        texts += [line["each"], str(line["n"]), str(line["seeds"]), cell(line)]
    allowed = {_plain(n) for text in texts for n in _NUMBER.findall(text)}
    return allowed | {f"{round(float(n)):g}" for n in allowed}
