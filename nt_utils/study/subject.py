"""What a run studies: its model and base model, its prompts by role, what it is evaluated on, its scores.

A notebook has ``subject = Subject(run)`` after ``run = begin(...)``. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nt_utils.data import attacks, corpus, sources, tasks
from nt_utils.errors import InputError
from nt_utils.files import cached, study_name
from nt_utils.study.parameters import EMBEDDED, QUICK_TOKENS, SOURCES, TESTBEDS
from nt_utils.study.provenance import code_fingerprint

if TYPE_CHECKING:
    from nt_utils.study.run import Run


# ------------------------------------------------------------------------------------------------------- checks


def check_inputs(parameters: SimpleNamespace) -> None:
    """Prompt sources, attacks and models: everything that can be refused before a model is loaded.

    Raises InputError with one line that names the parameter.
    """
    p = vars(parameters)
    _check_sources(p)
    for name in SOURCES:
        if p.get(name, "") not in ("", EMBEDDED):
            try:
                sources.load_prompts(p[name], limit=4)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
    if not parameters.model.strip():
        raise InputError("model: got ''; allowed: 'testbed', 'testbed-large', a hub id or a local folder")
    for name in ("model", "base_model"):
        source = model_source(parameters, name)
        if source and source not in TESTBEDS:
            from nt_utils import models

            models.check_source(source)


def _check_sources(p: dict[str, Any]) -> None:
    """Combinations of prompt sources that do not go together, and the names of attacks."""
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
    for name in _names(p.get("attacks", "")):
        try:
            attacks.attack(name)
        except InputError as error:
            raise InputError(f"attacks: {error}") from error


def model_source(parameters: SimpleNamespace, which: str) -> str:
    """Where ``model`` or ``base_model`` comes from; "" for no such model. A testbed's own base model is "auto"."""
    source = getattr(parameters, which, "")
    if source == "auto":
        return parameters.model if parameters.model in TESTBEDS else ""
    return source


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


# ------------------------------------------------------------------------------------------------------ subject


class Subject:
    """The models, prompts and scores of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.parameters = run.parameters

    @property
    def is_testbed(self) -> bool:
        """Whether the model under study is a testbed."""
        return self.parameters.model in TESTBEDS

    @property
    def is_embedded(self) -> bool:
        """Whether the prompts are the embedded corpus, whose answers are known."""
        return self.parameters.harmful == EMBEDDED

    @property
    def is_enforced(self) -> bool:
        """Whether the testbed's gate enforced its properties here: the testbed, its own prompts, a gate that was passed."""
        return self.is_testbed and self.is_embedded and bool(self.testbed.gate["passed"])

    @property
    def makes_units(self) -> bool:
        """Whether this notebook makes unit maps."""
        return hasattr(self.parameters, "unit_shares")

    # ------------------------------------------------------------------------------------------------ models

    @cached_property
    def testbed(self):
        """The testbed of this seed, trained if it is not in the cache. The quick preset has the same model."""
        return self._testbed(self.parameters.model)

    def _testbed(self, model: str):
        from nt_utils import testbed

        with self.run.timed("testbed"):
            return testbed.build(seed=self.parameters.seed, size=TESTBEDS[model])

    def load(self, which: str = "model"):
        """Load ``model`` or ``base_model`` (its unaligned counterpart); None when that parameter is ''."""
        from nt_utils import models, testbed

        p = self.parameters
        source = model_source(p, which)
        if not source:
            return None
        quiet = testbed.without_bar() if source in TESTBEDS else contextlib.nullcontext()
        if source in TESTBEDS:
            made = self.testbed if source == p.model else self._testbed(source)
            source = str(made.aligned if which == "model" else made.unaligned)
        with self.run.timed(f"load {which}"), quiet:
            lm = models.load(source, dtype=p.dtype, device_map=p.device_map, system_prompt=p.system_prompt or None)
        self.run.record(f"{which} weights", lm.weights_fingerprint)
        self.run.record(f"{which} architecture", lm.view.space.architecture)
        return lm

    def importance(self, lm, role: str, kinds, positions: str):
        """Exact importance on the prompts of a role, from file when the same scores were made before."""
        from nt_utils.neurons import NeuronScores
        from nt_utils.scoring.importance import importance

        prompts = self.prompts[role]
        path = self.run.path("scores", f"{role}_{positions}_{'-'.join(kinds)}.safetensors")
        key = {
            "weights": lm.weights_fingerprint,
            "prompts": prompts.fingerprint,
            "system": lm.system_prompt,
            "code": code_fingerprint(),
        }
        options = {"kinds": kinds, "positions": positions, "batch_size": self.parameters.batch_size}
        with self.run.timed("importance"):
            return cached(
                path,
                lambda file: NeuronScores.load(file, lm.view.space),
                lambda file: importance(lm, prompts.texts, **options, path=file),
                key,
            )

    # ----------------------------------------------------------------------------------------------- prompts

    @cached_property
    def prompts(self) -> dict[str, Any]:
        """Prompt sets by role: harmful, benign, general (to detect with) and, where there are any, second_harmful,
        second_benign, harmful_test, benign_test and borderline. No detection prompt is a test prompt."""
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
            self.run.record(
                f"prompts {role}", {"n": len(chosen), "fingerprint": chosen.fingerprint[:16], "name": chosen.name}
            )
        return sets

    def _source(self, name: str, kind: str):
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
            limit = QUICK_TOKENS if self.run.is_quick else whole.max_new_tokens
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
