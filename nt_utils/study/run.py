"""One run = one model, one seed, one folder: its parameters, its tables and figures, and what made them.

A notebook's second cell is ``run = begin("01_safety_neurons", globals())``: it checks every parameter
before anything is loaded, and gives the run its folder ``runs/<study>/seed-<seed>/``. Results tables are
byte-identical for a seed; seconds and time stamps go to timings.csv and provenance.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import random
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nt_utils.errors import InputError
from nt_utils.files import atomic, cached, run_folder, study_name
from nt_utils.study.parameters import EMBEDDED, QUICK_TOKENS, SOURCES, TESTBEDS, check_parameters, from_notebook
from nt_utils.study.provenance import code_fingerprint, git_revision, versions

LONG = 20  # rows of a shown table beyond which it scrolls

# ------------------------------------------------------------------------------------------------------- run


def begin(notebook: str, values: Mapping[str, Any], history: list[str] | None = None) -> Run:
    """Check a notebook's parameters, prompt sources, model and output folder; return its :class:`Run`.

    Nothing is loaded. Raises InputError with one readable line.
    """
    if history is None:
        history = [str(cell) for cell in values.get("In", [])]
    p = check_parameters(from_notebook(history, values))
    run = Run(notebook, p, run_folder(p.runs, study_name(p.model, p.study, p.preset), p.seed))
    run.check_inputs()
    run.provenance()
    if run.is_quick:
        print(f"{run.label}, seed {p.seed}, PRESET QUICK: few prompts and steps, to try things out, not for results")
    return run


@dataclass
class Run:
    """The folder of one model and seed, seen from one notebook.

    ``tables/``, ``figures/``, ``neurons/``, ``scores/`` and ``findings/`` hold what it made, each file named after
    the notebook's number; ``provenance/<notebook>.json`` says with what.
    """

    notebook: str
    parameters: SimpleNamespace
    folder: Path
    findings: list[dict] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    @property
    def number(self) -> str:
        """The notebook's number, which its files start with."""
        return self.notebook.split("_")[0]

    @property
    def is_testbed(self) -> bool:
        """Whether the model under study is a testbed."""
        return self.parameters.model in TESTBEDS

    @property
    def is_quick(self) -> bool:
        """Whether this run only shows that everything works: its figures and findings say so."""
        return getattr(self.parameters, "preset", "") == "quick"

    @property
    def mark(self) -> str:
        """What findings add to the model's name."""
        return " (quick)" if self.is_quick else ""

    def check_inputs(self) -> None:
        """Output folder, prompt sources and model: everything that can be refused before a model is loaded."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(self.folder / ".writable") as tmp:
                tmp.touch()
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise InputError(f"runs: {self.folder} cannot be written ({error.strerror})") from error
        from nt_utils.data import sources

        self._check_folder()
        self._check_sources()
        for name in SOURCES:
            if getattr(self.parameters, name, "") not in ("", EMBEDDED):
                try:
                    sources.load_prompts(getattr(self.parameters, name), limit=4)
                except InputError as error:
                    raise InputError(f"{name}: {error}") from error
        if not self.parameters.model.strip():
            raise InputError("model: got ''; allowed: 'testbed', 'testbed-large', a hub id or a local folder")
        for name in ("model", "base_model"):
            source = self._model_source(name)
            if source and source not in TESTBEDS:
                from nt_utils import models

                models.check_source(source)

    def _check_sources(self) -> None:
        """Combinations of prompt sources that do not go together, and the names of attacks."""
        p = vars(self.parameters)
        embedded = [p[name] == EMBEDDED for name in ("harmful", "benign") if name in p]
        if len(set(embedded)) > 1:
            raise InputError(
                f"benign: got {p['benign']!r} with harmful={p['harmful']!r}; both are {EMBEDDED!r} or neither is"
            )
        if embedded and embedded[0]:
            for name, allowed in (("harmful_test", ("",)), ("benign_test", ("",)), ("second_language", ("", EMBEDDED))):
                if p.get(name, "") not in allowed:
                    raise InputError(
                        f"{name}: got {p[name]!r}; allowed with harmful={EMBEDDED!r}: {' or '.join(map(repr, allowed))}"
                    )
        if p.get("attacks"):
            from nt_utils.data.attacks import attack

            for name in _names(p["attacks"]):
                try:
                    attack(name)
                except InputError as error:
                    raise InputError(f"attacks: {error}") from error

    def _check_folder(self) -> None:
        """Refuse to mix two models in one run folder."""
        for note in sorted((self.folder / "provenance").glob("*.json")):
            other = json.loads(note.read_text(encoding="utf-8"))["parameters"].get("model")
            if other != self.parameters.model:
                raise InputError(
                    f"study: {self.folder} holds results of model {other!r}; give this model ({self.parameters.model!r}) a study name"
                )

    # ------------------------------------------------------------------------------------------------ models

    @cached_property
    def testbed(self):
        """The testbed of this seed, trained if it is not in the cache. The quick preset trains the same model."""
        return self._testbed(self.parameters.model)

    def _testbed(self, model: str):
        from nt_utils import testbed

        with self.timed("testbed"):
            return testbed.build(seed=self.parameters.seed, size=TESTBEDS[model])

    def _model_source(self, which: str) -> str:
        source = getattr(self.parameters, which, "")
        if source == "auto":
            return self.parameters.model if self.is_testbed else ""
        return source

    def load(self, which: str = "model"):
        """Load ``model`` or ``base_model`` (its unaligned counterpart); None when that parameter is ''."""
        from nt_utils import models, testbed

        p = self.parameters
        source = self._model_source(which)
        if not source:
            return None
        quiet = testbed.without_bar() if source in TESTBEDS else contextlib.nullcontext()
        if source in TESTBEDS:
            made = self.testbed if source == p.model else self._testbed(source)
            source = str(made.aligned if which == "model" else made.unaligned)
        with self.timed(f"load {which}"), quiet:
            lm = models.load(source, dtype=p.dtype, device_map=p.device_map, system_prompt=p.system_prompt or None)
        self.record(f"{which} weights", lm.weights_fingerprint)
        self.record(f"{which} architecture", lm.view.space.architecture)
        return lm

    @property
    def label(self) -> str:
        """What tables and the ledger call the model: its hub id, or its folder's name."""
        path = Path(self.parameters.model).expanduser()
        return path.resolve().name if path.is_dir() else self.parameters.model

    @property
    def is_enforced(self) -> bool:
        """Whether the testbed's gate enforced its properties here: the testbed, its own prompts, a gate that was passed."""
        return self.is_testbed and self.is_embedded and bool(self.testbed.gate["passed"])

    # ----------------------------------------------------------------------------------------------- prompts

    @property
    def is_embedded(self) -> bool:
        """Whether the prompts are the embedded corpus, whose answers are known."""
        return self.parameters.harmful == EMBEDDED

    @cached_property
    def prompts(self) -> dict[str, Any]:
        """Prompt sets by role: harmful, benign, general (to detect with) and, where there are any, second_harmful,
        second_benign, harmful_test, benign_test and borderline. No detection prompt is a test prompt."""
        from nt_utils.data import corpus

        p, sets = self.parameters, {}
        n, seed = getattr(p, "n_detect", getattr(p, "n_calibrate", p.n_test)), p.seed
        if p.harmful == EMBEDDED:
            sets["harmful"], sets["benign"] = corpus.pairs(n, "train", "en", seed)
        else:
            sets |= self._split("harmful", n) | self._split("benign", n)
        if getattr(p, "second_language", "") == EMBEDDED and self.is_embedded:
            sets["second_harmful"], sets["second_benign"] = corpus.pairs(n, "train", "de", seed)
        elif getattr(p, "second_language", "") not in ("", EMBEDDED):
            halves = self._split("second_language", n)
            sets |= {"second_harmful": halves["second_language"], "second_test": halves["second_language_test"]}
        if getattr(p, "general", "") == EMBEDDED:
            sets["general"] = corpus.general(n, "train", seed)
        elif getattr(p, "general", ""):
            sets["general"] = self._source("general", "general").take(n, seed)
        if getattr(p, "borderline", "") not in ("", EMBEDDED):
            sets["borderline"] = self._source("borderline", "borderline").take(p.n_test, seed)
        for role, chosen in sets.items():
            self.record(
                f"prompts {role}", {"n": len(chosen), "fingerprint": chosen.fingerprint[:16], "name": chosen.name}
            )
        return sets

    def _source(self, name: str, kind: str):
        from nt_utils.data import sources

        return sources.load_prompts(getattr(self.parameters, name), kind=kind)

    def _split(self, name: str, n: int) -> dict[str, Any]:
        """``name``: n rows to detect with; ``name_test``: n_test others, or rows of the source ``<name>_test``."""
        kind = "harmful" if name == "second_language" else name
        p = self.parameters
        own = self._source(name, kind)
        other = getattr(p, f"{name}_test", "")
        if other and other != EMBEDDED:
            seen = set(own.texts)
            test = self._source(f"{name}_test", kind).filter(text=lambda text: text not in seen)
            return {name: own.take(n, p.seed), f"{name}_test": test.take(p.n_test, p.seed)}
        mixed = own.take(n + p.n_test, p.seed)
        n = min(n, len(mixed) * n // (n + p.n_test))
        if n < 2 or len(mixed) - n < 2:
            raise InputError(
                f"{name}: {getattr(p, name)} has {len(own)} prompts, too few to detect with some and test on others"
            )
        detect = set(mixed.take(n, p.seed + 1).texts)
        parts = {
            name: mixed.filter(text=lambda t: t in detect),
            f"{name}_test": mixed.filter(text=lambda t: t not in detect),
        }
        return {role: part.rename(f"{part.name} ({role})") for role, part in parts.items()}

    @cached_property
    def tuning_prompts(self) -> tuple[Any, Any]:
        """Harmful prompts that learn their refusal and benign ones that learn their answer, n_tune of each.

        They are detection prompts, as in [SN]; of the embedded benign ones half are how-to requests in the harmful
        ones' wordings and half other tasks. Without a refusal of its own a prompt gets the parameter `refusal`.
        """
        from nt_utils.data import corpus

        p = self.parameters
        if self.makes_units:  # not the rows that are left to choose on
            harmful, benign = (rows.take(p.n_tune, p.seed) for rows in self.calibration_prompts)
        else:
            harmful, benign = (self.prompts[role].take(p.n_tune, p.seed) for role in ("harmful", "benign"))
        if not self.is_embedded:
            harmful = harmful.map(lambda prompt: prompt if prompt.refusal else prompt.replace(refusal=p.refusal))
            return harmful, benign
        others = corpus.utility(20, "train", p.seed).take(p.n_tune - p.n_tune // 2, p.seed)
        return harmful, self.prompts["benign"].take(p.n_tune // 2, p.seed) + others

    @property
    def makes_units(self) -> bool:
        """Whether this notebook makes unit maps."""
        return hasattr(self.parameters, "unit_shares")

    @cached_property
    def calibration_prompts(self) -> tuple[Any, Any]:
        """Harmful and benign prompts that unit maps are made from: the embedded pairs, or three quarters of own rows.

        The other rows are left to choose on (:meth:`suite`, split "dev"). Where the notebook has a text `refusal`, harmful
        prompts without one of their own get it.
        """
        p, found = self.parameters, []
        for kind in ("harmful", "benign"):
            rows = self.prompts[kind]
            found.append(rows if self.is_embedded else rows.take(3 * len(rows) // 4, p.seed))
        text = getattr(p, "refusal", "")
        return found[0].map(lambda prompt: prompt if prompt.refusal else prompt.replace(refusal=text)), found[1]

    def suite(self, split: str = "test"):
        """What the model is evaluated on: the embedded corpus's test split, or the given sources' test rows.

        Split "dev" is for choosing (learning rates, doses): n_dev prompts of the development split; of own sources
        detection rows that are not tuned on, and borderline rows that are not test rows.
        """
        from nt_utils.evaluation import suite as suites

        p = self.parameters
        n = p.n_test if split == "test" else p.n_dev
        if self.is_embedded:
            whole = suites.corpus_suite(split, seed=p.seed)
            sizes = {"wrapped": 4 * n}
            sets = [dataclasses.replace(s, prompts=s.prompts.take(sizes.get(s.name, n), p.seed)) for s in whole.sets]
            limit = QUICK_TOKENS if self.is_quick else whole.max_new_tokens
            return suites.Suite(tuple(sets), whole.name, p.max_new_tokens or limit)
        rows = self._test_rows() if split == "test" else self._dev_rows(n)
        built = suites.make_suite(
            **rows,
            attacks=_names(getattr(p, "attacks", "")),
            max_new_tokens=p.max_new_tokens or 256,
            name=study_name(p.model, p.study),
        )
        if split == "test" and "second_test" in self.prompts:
            second = suites.SuiteSet("direct-second", self.prompts["second_test"], ("asr", "refusal", "degenerate"))
            built = dataclasses.replace(built, sets=(*built.sets, second))
        return built

    def _test_rows(self) -> dict[str, Any]:
        roles = {"harmful": "harmful_test", "benign": "benign_test", "borderline": "borderline", "text": "general"}
        return {kind: self.prompts.get(role) for kind, role in roles.items()}

    def _dev_rows(self, n: int) -> dict[str, Any]:
        """Rows to choose on: neither tuned on nor tested on."""
        p, rows = self.parameters, {}
        used = self.calibration_prompts if self.makes_units else self.tuning_prompts
        for kind, tuned in zip(("harmful", "benign"), used, strict=True):
            seen = set(tuned.texts)
            rows[kind] = self.prompts[kind].filter(text=lambda text, seen=seen: text not in seen).take(n, p.seed)
            if len(rows[kind]) < 4:
                raise InputError(
                    f"{kind}: {len(tuned)} of its {len(self.prompts[kind])} detection prompts are tuned on; "
                    "too few are left to choose on"
                )
        if "borderline" in self.prompts:
            seen = set(self.prompts["borderline"].texts)
            rest = self._source("borderline", "borderline").filter(text=lambda text: text not in seen)
            rows["borderline"] = rest.take(n, p.seed) if len(rest) >= 4 else None
        return rows

    @cached_property
    def new_task(self) -> tuple[Any, Any, Any]:
        """Rows of `new_task` to fine-tune on (n_task), others to choose the rate on (n_dev) and to test on (n_test)."""
        from nt_utils.data import tasks

        p = self.parameters
        if p.new_task == EMBEDDED:
            sizes = {"train": p.n_task, "dev": p.n_dev, "test": p.n_test}
            train, dev, test = (tasks.differences(n, split, p.seed) for split, n in sizes.items())
            return train, dev, test
        rows = self._source("new_task", "benign").filter(helpful=bool)
        rows = rows.take(p.n_task + p.n_dev + p.n_test, p.seed)
        if len(rows) < 12:
            raise InputError(f"new_task: {p.new_task} has {len(rows)} prompts with an answer; at least 12 are needed")
        first, second = (len(rows) * n // (p.n_task + p.n_dev + p.n_test) for n in (p.n_task, p.n_task + p.n_dev))
        mixed = list(range(len(rows)))
        random.Random(p.seed).shuffle(mixed)
        return tuple(rows[part] for part in (mixed[:first], mixed[first:second], mixed[second:]))

    def importance(self, lm, role: str, kinds, positions: str):
        """Exact importance on the prompts of a role, from file when the same scores were made before."""
        from nt_utils.neurons import NeuronScores
        from nt_utils.scoring.importance import importance

        prompts = self.prompts[role]
        path = self.path("scores", f"{role}_{positions}_{'-'.join(kinds)}.safetensors")
        key = {
            "weights": lm.weights_fingerprint,
            "prompts": prompts.fingerprint,
            "system": lm.system_prompt,
            "code": code_fingerprint(),
        }
        with self.timed("importance"):
            return cached(
                path,
                lambda file: NeuronScores.load(file, lm.view.space),
                lambda file: importance(
                    lm,
                    prompts.texts,
                    kinds=kinds,
                    positions=positions,
                    batch_size=self.parameters.batch_size,
                    path=file,
                ),
                key,
            )

    # ----------------------------------------------------------------------------------------------- outputs

    def path(self, kind: str, name: str) -> Path:
        """Where a file of this notebook goes: ``kind`` is tables, figures, neurons or scores."""
        return self.folder / kind / f"{self.number}_{name}"

    def table(self, name: str, frame) -> Path:
        """Save a results table as CSV (atomic; six significant digits, so that a rerun is byte-identical)."""
        path = self.path("tables", f"{name}.csv")
        with atomic(path) as tmp:
            frame.to_csv(tmp, index=False, float_format="%.6g")
        return path

    def figure(self, name: str, frame):
        """Save a figure's table, draw it with ``plots.<name>`` from that table, save it (see ``plots.draw``), and show it.

        The quick preset draws the PNG alone.
        """
        from IPython.display import Image

        from nt_utils import plots

        path = self.path("figures", f"{name}.csv")
        with atomic(path) as tmp:
            frame.to_csv(tmp, index=False, float_format="%.6g")
        plots.draw(path, pictures=(".png",) if self.is_quick else plots.PICTURES)
        return Image(filename=str(path.with_suffix(".png")), width=820)

    def show(self, frame, caption: str, formats: Mapping[str, str] | None = None):
        """A table for display: a caption, no index, words at the left; more than LONG rows scroll in a box of their own.

        Args:
            caption: what the rows are, and what the numbers mean.
            formats: format strings of single columns; other fractions have three digits, and what is missing is empty.
        """
        frame = frame.reset_index(drop=True)
        words = [c for c in frame.columns if not frame[c].map(lambda v: isinstance(v, (int, float))).all()]
        left, box = [("text-align", "left"), ("vertical-align", "top")], []
        styler = frame.style.set_caption(caption).format(formats, precision=3, na_rep="").hide()
        styler = styler.set_uuid(f"{self.number}-{zlib.crc32(caption.encode()):08x}")  # the same in every run
        if len(frame) > LONG:
            head = [("position", "sticky"), ("top", "0"), ("background", "var(--jp-layout-color0, white)")]
            box = [
                {"selector": "", "props": [("display", "block"), ("max-height", "32em"), ("overflow-y", "auto")]},
                {"selector": "thead th", "props": head},
            ]
        title = [("caption-side", "top"), ("white-space", "normal"), ("font-style", "italic"), ("padding", "4px 0")]
        styler = styler.set_table_styles([{"selector": "caption", "props": [*left, *title]}, *box])
        short = {c for c in words if frame[c].astype(str).str.len().max() <= 20}  # a verdict stays on its line
        line = [("white-space", "nowrap")]
        columns = {c: [{"selector": "", "props": left + line * (c in short)}] for c in words}
        return styler.set_table_styles(columns, overwrite=False)

    @contextlib.contextmanager
    def timed(self, what: str):
        """Add the block's seconds to the run's timings."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[what] = self.timings.get(what, 0.0) + time.perf_counter() - start

    def timing_table(self, name: str, frame) -> Path:
        """Save a table of seconds and bytes, which differ from run to run, beside the timings."""
        path = self.path("timings", f"{name}.csv")
        with atomic(path) as tmp:
            frame.to_csv(tmp, index=False, float_format="%.4g")
        return path

    def record(self, what: str, value: Any) -> None:
        """Keep a fact for provenance: a fingerprint, a count of dropped prompts."""
        self.facts[what] = value

    def claim(self, claim: str, statement: str, interval, paper: str, section: str = "", **verdict) -> dict:
        """Record a finding in this run's ledger.

        Args:
            claim: short stable name; statement: the claim in words, with its margin; paper, section: who makes it.
            interval: (value, low, high, n), as the functions of ``evaluation.metrics`` return it.
            verdict: the margin and marks, see :func:`nt_utils.study.ledger.finding`.
        """
        from nt_utils.study import ledger

        value, low, high, n = interval
        row = ledger.finding(
            claim=claim,
            paper=paper,
            section=section,
            model=self.label + self.mark,
            statement=statement,
            value=value,
            low=low,
            high=high,
            n=n,
            seeds=str(self.parameters.seed),
            notebook=self.notebook,
            **verdict,
        )
        self.findings = [f for f in self.findings if f["claim"] != claim] + [row]
        return row

    def findings_table(self):
        """This notebook's findings, for display."""
        import pandas as pd

        shown = ["statement", "value", "low", "high", "n", "verdict"]
        caption = f"Findings of this run ({self.label}, seed {self.parameters.seed}): value, 95% interval, n, verdict."
        return self.show(pd.DataFrame(self.findings, columns=shown), caption)

    def finish(self) -> None:
        """Write findings, timings and provenance. Every notebook ends with it."""
        import pandas as pd

        from nt_utils.study import ledger

        if self.findings:
            with atomic(self.folder / "findings" / f"{self.notebook}.csv") as tmp:
                pd.DataFrame(self.findings, columns=ledger.COLUMNS).to_csv(tmp, index=False, float_format="%.6g")
        self._write_timings()
        self._drop_leftovers()
        self.provenance(seconds=round(time.time() - self.started, 1))
        print(f"{self.notebook}: tables, figures and findings are in {self.folder}")

    def _drop_leftovers(self) -> None:
        """Remove what an earlier run of this notebook left and this one did not write again."""
        for kind in ("tables", "figures", "neurons", "deltas"):
            for file in (self.folder / kind).glob(f"{self.number}_*"):
                if file.stat().st_mtime < self.started - 1:
                    file.unlink()

    def _write_timings(self) -> None:
        import pandas as pd

        rows = [{"notebook": self.notebook, "step": step, "seconds": round(s, 2)} for step, s in self.timings.items()]
        with atomic(self.folder / "timings" / f"{self.notebook}.csv") as tmp:
            pd.DataFrame(rows, columns=["notebook", "step", "seconds"]).to_csv(tmp, index=False)

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
            "git": git_revision(),
            "code": code_fingerprint(),
            "versions": versions(),
            "machine": {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
        }
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
