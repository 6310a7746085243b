"""One run = one model, one seed, one folder: its parameters, its tables and figures, its claims, and what made them.

A notebook's second cell is ``run = begin("01_safety_neurons", globals())``: it checks every parameter
before anything is loaded, and gives the run its folder ``runs/<study>/seed-<seed>/``. Results tables are
byte-identical for a seed; seconds and time stamps go to timings/ and provenance/.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nt_utils import work
from nt_utils.errors import InputError
from nt_utils.files import atomic, cached, project_root, read_json, run_folder, study_name
from nt_utils.study import claims, display, ledger
from nt_utils.study.parameters import check_parameters, from_notebook
from nt_utils.study.provenance import EDITED, code_edited, code_fingerprint, git_revision, machine, notes, versions
from nt_utils.study.subject import check_inputs


def begin(notebook: str, values: Mapping[str, Any], history: list[str] | None = None) -> Run:
    """Check a notebook's parameters, prompt sources, model and output folder; return its :class:`Run`.

    Nothing is loaded. Raises InputError with one readable line.
    """
    if history is None:
        history = [str(cell) for cell in values.get("In", [])]
    p = check_parameters(from_notebook(history, values))
    run = Run(notebook, p, run_folder(p.runs, study_name(p.model, p.study, p.preset), p.seed))
    run.check_folder()
    check_inputs(run)
    run.provenance()
    if run.is_quick:
        print(f"{run.label}, seed {p.seed}, PRESET QUICK: few prompts and steps, to try things out, not for results")
    return run


@dataclass
class Run:
    """The folder of one model and seed, seen from one notebook.

    ``tables/``, ``figures/``, ``neurons/``, ``scores/`` and ``claims/`` hold what it made, each file named after
    the notebook's number; ``provenance/<notebook>.json`` says with what.
    """

    notebook: str
    parameters: SimpleNamespace
    folder: Path
    handed_in: dict[tuple[str, str, str], dict] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    taken_over: dict[str, dict] = field(default_factory=dict)  # table -> what made it, where an interrupted run did
    started: float = field(default_factory=time.time)
    since: float = 0.0  # when this run began, by the clock of the folder's file server

    @property
    def number(self) -> str:
        """The notebook's number, which its files start with."""
        return self.notebook.split("_")[0]

    @property
    def is_quick(self) -> bool:
        """Whether this run only shows that everything works: its figures and findings say so."""
        return getattr(self.parameters, "preset", "") == "quick"

    def check_folder(self) -> None:
        """Refuse a folder that cannot be written, and one that holds another model's results."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(self.folder / ".writable") as tmp:
                tmp.touch()
            self.since = (self.folder / ".writable").stat().st_mtime
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise InputError(f"runs: {self.folder} cannot be written ({error.strerror})") from error
        for note in notes(self.folder).values():
            other = note["parameters"].get("model")
            if other != self.parameters.model:
                raise InputError(
                    f"study: {self.folder} holds results of model {other!r}; "
                    f"give this model ({self.parameters.model!r}) a study name"
                )

    @property
    def label(self) -> str:
        """What tables and the ledger call the model: its hub id, or its folder's name."""
        path = Path(self.parameters.model).expanduser()
        return path.resolve().name if path.is_dir() else self.parameters.model

    # ----------------------------------------------------------------------------------------------- outputs

    def path(self, kind: str, name: str) -> Path:
        """Where a file of this notebook goes: ``kind`` is tables, figures, neurons or scores."""
        return self.folder / kind / f"{self.number}_{name}"

    def table(self, name: str, frame, kind: str = "tables") -> Path:
        """Save a results table as CSV (atomic; six significant digits, so that a rerun is byte-identical)."""
        return ledger.write_table(self.path(kind, f"{name}.csv"), frame)

    def figure(self, name: str, frame):
        """Save a figure's table, draw it with ``plots.<name>`` from that table, save it (see ``plots.draw``), and show it.

        The quick preset draws the PNG alone.
        """
        from IPython.display import Image

        from nt_utils import plots

        path = self.table(name, frame, "figures")
        plots.draw(path, pictures=(".png",) if self.is_quick else plots.PICTURES)
        return Image(filename=str(path.with_suffix(".png")), width=820)

    def show(self, frame, caption: str, formats: Mapping[str, str] | None = None):
        """A table for display, see :func:`nt_utils.study.display.styled`."""
        return display.styled(frame, caption, formats, self.number)

    @contextlib.contextmanager
    def timed(self, what: str):
        """Add the block's seconds to the run's timings."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[what] = self.timings.get(what, 0.0) + time.perf_counter() - start

    def kept(self, name: str, make: Callable[[], Any]):
        """``make()``, a table that takes long, or what an interrupted run left of it: with the same parameters, code, weights
        and prompts, as far as they were recorded by now (``Subject`` records what it loads and every prompt set it gives).
        The file goes when the run is finished; provenance says what made a table that was taken over."""
        import pandas as pd

        path = self.path("kept", f"{name}.parquet")
        note = path.with_suffix(".made.json")

        def anew(path: Path):
            made = make()
            with atomic(path) as tmp:
                made.to_parquet(tmp)
            with atomic(note) as tmp:
                tmp.write_text(json.dumps({"machine": machine(), "git": git_revision()}), encoding="utf-8")
            return made

        def taken_over(path: Path):
            self.taken_over[name] = read_json(note)
            return pd.read_parquet(path)

        key = {"parameters": vars(self.parameters), "facts": self.facts, "code": code_fingerprint()}
        return cached(path, taken_over, anew, key)

    def checkpoint(self, name: str) -> str:
        """File name of what this code's trainings keep to go on from ("{key}": which training). It goes like :meth:`kept`'s."""
        return str(self.path("kept", f"{name}_{code_fingerprint()}_{{key}}.safetensors"))

    def timing_table(self, name: str, frame) -> Path:
        """Save a table of seconds and bytes, which differ from run to run, beside the timings."""
        return ledger.write_table(self.path("timings", f"{name}.csv"), frame, "%.4g")

    def record(self, what: str, value: Any) -> None:
        """Keep a fact for provenance: a fingerprint, a count of dropped prompts."""
        self.facts[what] = value

    # ----------------------------------------------------------------------------------------------- claims

    def measured(self, claim: str, interval: Sequence[float], *, row: str = "", part: str = "") -> None:
        """Hand in a quantity of one of the thirty claims (:mod:`nt_utils.study.claims`), which decide what it says.

        Args:
            claim: its id; interval: (value, low, high, n) with 95% limits, as the functions of ``evaluation.metrics`` give it:
                these know its degrees of freedom, and plain numbers are taken to have a normal distribution's limits.
            row: what the claim is tested on, where it has several rows; part: the quantity, where it has several.
        """
        what, which, found = claims.checked(claim, row, part, interval)
        self._hand_in(what, row, which.name, found._asdict() | {"freedom": found.freedom})

    def not_testable(self, claim: str, reason: str, *, row: str | None = None, part: str = "") -> None:
        """Say why this run cannot test a claim, in one row or in all of them (None)."""
        what = claims.claim(claim)
        parts = [what.part(part)] if part else what.parts
        for one in what.rows if row is None else (what.check_row(row),):
            for which in parts:
                self._hand_in(what, one, which.name, {"reason": reason})

    def _hand_in(self, what: claims.Claim, row: str, part: str, found: dict[str, Any]) -> None:
        if what.notebook != self.notebook:
            raise InputError(f"claim {what.id}: belongs to {what.notebook}, not to {self.notebook}")
        self.handed_in[what.id, row, part] = found

    def claims_table(self):
        """This notebook's claims with their verdicts in this run, for display."""
        import pandas as pd

        found = ledger.verdicts(ledger.run_rows(self), self.notebook)
        caption = (
            f"Claims of this notebook ({self.label}, seed {self.parameters.seed}): 95% intervals and what they decide."
        )
        return self.show(pd.DataFrame(found)[list(ledger.NOTEBOOK_COLUMNS)], caption)

    def finish(self) -> None:
        """Write claims, timings and provenance. Every notebook ends with it."""
        import pandas as pd

        from nt_utils.interventions import kept

        if claims.rows(self.notebook):
            frame = pd.DataFrame(ledger.run_rows(self), columns=list(ledger.COLUMNS))
            ledger.write_table(self.folder / "claims" / f"{self.notebook}.csv", frame)
        took = [(self.notebook, step, round(seconds, 2)) for step, seconds in self.timings.items()]
        frame = pd.DataFrame(took, columns=["notebook", "step", "seconds"])
        ledger.write_table(self.folder / "timings" / f"{self.notebook}.csv", frame, None)
        self._drop_leftovers()
        self.taken_over |= {f"trainings {i}": made for i, made in enumerate(kept.TAKEN, 1)}
        self.provenance(seconds=round(time.time() - self.started, 1))
        where, root = self.folder.resolve(), project_root().resolve()
        if where.is_relative_to(root):  # the saved notebook names no place of this machine
            where = where.relative_to(root)
        print(f"{self.notebook}: tables, figures and claims are in {where}")
        if code_edited():
            print(
                "nt_utils was edited while this notebook ran, and what it loaded later is the edited code: run it again"
            )

    def _drop_leftovers(self) -> None:
        """Remove what an earlier run of this notebook left and this one did not write again."""
        for kind in ("tables", "figures", "neurons", "deltas", "kept"):
            named = (
                f"{self.number}_*",
                f".{self.number}_*",
            )  # a killed process leaves a temporary file, whose name has a dot
            for file in (file for name in named for file in (self.folder / kind).glob(name)):
                if kind == "kept" or file.stat().st_mtime < self.since:
                    file.unlink()

    def provenance(self, seconds: float | None = None) -> Path:
        """Write provenance/<notebook>.json: parameters, versions, git revision, fingerprints, time."""
        path = self.folder / "provenance" / f"{self.notebook}.json"
        body = {
            "notebook": self.notebook,
            "finished": seconds is not None,
            "seconds": seconds,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "parameters": vars(self.parameters),
            "facts": self.facts,
            "work": work.measured() if seconds is not None else {},
            "git": git_revision(),
            "code": code_fingerprint() + (EDITED if code_edited() else ""),
            "versions": versions(),
            "machine": machine(),
            "kept": self.taken_over,
        }
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path
