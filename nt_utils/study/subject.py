"""What a run studies: its model and base model, its prompts by role, what it is evaluated on, its scores.

A notebook has ``subject = Subject(run)`` after ``run = begin(...)``. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import uuid
from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nt_utils.data import attacks, corpus, sources, splits
from nt_utils.data.records import PromptSet
from nt_utils.data.splits import Splits
from nt_utils.errors import InputError
from nt_utils.files import cached, study_name
from nt_utils.study.parameters import EMBEDDED, QUICK_TOKENS, SOURCES, TESTBEDS
from nt_utils.study.provenance import code_fingerprint, git_revision, machine

if TYPE_CHECKING:
    from nt_utils.evaluation.judges import Judge
    from nt_utils.evaluation.suite import Suite
    from nt_utils.models import Prompter
    from nt_utils.study.run import Run


ANSWER_TOKENS = 256  # of an answer to a given prompt, unless max_new_tokens says otherwise
GENERAL_TOKENS = 128  # of running text, in notebooks without the parameter

# ------------------------------------------------------------------------------------------------------- checks


PHRASES = "phrases"  # the judge that reads an answer's own words
#: What a notebook that has a parameter needs of its prompts: parameter -> (roles, use, least number).
NEEDS = {
    "n_detect": (("harmful", "benign", "general", "second_language"), "detect", 4),
    "n_calibrate": (("harmful", "benign"), "detect", 16),
    "n_tune": (("harmful", "benign"), "tune", 2),
    "n_dev": (("harmful", "benign"), "develop", 4),
    "n_test": (("harmful", "benign", "borderline", "general", "second_language"), "test", 4),
    "n_task": (("new_task",), "tune", 4),
}


def check_inputs(run: Run) -> None:
    """Prompt sources, numbers of prompts, attacks and models: everything that can be refused before a model is loaded.

    Raises InputError with one line that names the parameter.
    """
    parameters, given = run.parameters, vars(run.parameters)
    _check_sources(given)
    for name in SOURCES:
        if given.get(name, "") not in ("", EMBEDDED):
            try:
                sources.load_prompts(given[name], limit=4)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
    if not parameters.model.strip():
        raise InputError("model: got ''; allowed: 'testbed', 'testbed-large', a hub id or a local folder")
    for name in ("model", "base_model"):
        source = model_source(parameters, name)
        if source and source not in TESTBEDS:
            from nt_utils import models

            models.load_prompter(source, **text_options(parameters)).render(["x"])
    check_judge(given)
    if (growth := given.get("growth")) and min(growth) > 0.3:
        raise InputError(f"growth: got {growth}; allowed: the smallest at most 0.3, so that three groups fit")
    if sum(given.get("unit_shares", ())) > 1 + 1e-9:
        raise InputError(f"unit_shares: got {given['unit_shares']}; allowed: together at most 1")
    _check_numbers(Subject(run))


def text_options(parameters: SimpleNamespace) -> dict[str, str]:
    """How the model's prompts are rendered, as :func:`nt_utils.models.load` takes it."""
    names = ("system_prompt", "chat_template", "template_arguments", "date")
    return {name: value for name in names if (value := getattr(parameters, name, ""))}


def check_judge(given: Mapping[str, Any]) -> None:
    """A judge that there is, and that is not asked about answers which are known."""
    name = given.get("judge", PHRASES)
    if name == PHRASES:
        return
    if given.get("harmful") == EMBEDDED:
        allowed = f"allowed with harmful={EMBEDDED!r}: {PHRASES!r} (the right answers are known)"
        raise InputError(f"judge: got {name!r}; {allowed}")
    from nt_utils import models
    from nt_utils.evaluation.classifier import PRESETS

    second = name.removeprefix(f"{PHRASES}+")
    if second not in ("known", *PRESETS):
        try:
            models.check_source(second)
        except InputError as error:
            raise InputError(f"judge: {error}") from error


def _check_numbers(subject: Subject) -> None:
    """Enough prompts for every use that this notebook has."""
    given = vars(subject.parameters)
    for name, (roles, use, least) in NEEDS.items():
        for role in roles if name in given else ():
            if role not in subject.splits:
                continue
            if not subject.is_embedded and given[role] != EMBEDDED:
                found = subject.splits.require(role, use, least)
                if found < given[name]:
                    print(f"{role}: {found} prompts to {use} with, where {name} asks for {given[name]}")
                if not subject.is_testbed:
                    subject.rows(role, use, given[name])  # refuses what is too long for the model
            elif role in ("harmful", "second_language") and use in ("detect", "tune"):
                try:
                    splits.pairs(given[name], use, "en" if role == "harmful" else "de", given["seed"])
                except InputError as error:
                    raise InputError(f"{name}: {str(error).removeprefix('n: ')}") from error
    if given.get("new_task"):
        _check_harmful_rows(subject, given)
    if "n_support" in given:  # an inner and an outer step take as many prompts each
        name = "n_detect" if not subject.is_embedded else "n_learn" if "n_learn" in given else "n_defence"
        if given["n_support"] > given[name] // 2:
            raise InputError(f"n_support: got {given['n_support']}; allowed: 1 to {given[name] // 2}, half of {name}")


def _check_harmful_rows(subject: Subject, given: Mapping[str, Any]) -> None:
    """No more harmful rows in a fine-tuning attack than there are, or than rows in all."""
    task, harmful = (subject.splits.rows(role, "tune", given["n_task"]) for role in ("new_task", "harmful"))
    wanted = {"harmful_rows": given.get("harmful_rows", 0), "defence_attacks": max(given.get("defence_attacks", [0]))}
    if all(prompt.helpful for prompt in harmful):  # else notebook 04 leaves them out
        wanted["harmful_share"] = round(given.get("harmful_share", 0) * len(task))
    most = min(len(task), len(harmful))
    for name, bad in wanted.items():
        if bad > most:
            rows = f"{len(harmful)} harmful prompts to tune with, {len(task)} rows in all"
            raise InputError(f"{name}: got {given[name]}, {bad} harmful rows; allowed: 0 to {most} ({rows})")


def _check_sources(p: dict[str, Any]) -> None:
    """Combinations of prompt sources that do not go together, and the names of attacks."""
    embedded = [p[name] == EMBEDDED for name in ("harmful", "benign") if name in p]
    if len(set(embedded)) > 1:
        given = f"got {p['benign']!r} with harmful={p['harmful']!r}"
        raise InputError(f"benign: {given}; both are {EMBEDDED!r} or neither is")
    if embedded and embedded[0]:
        own = {
            "harmful_test": [""],
            "benign_test": [""],
            "second_language": ["", EMBEDDED],
            "borderline": ["", EMBEDDED],
        }
        for name, allowed in own.items():
            if p.get(name, "") not in allowed:
                words = " or ".join(map(repr, allowed))
                raise InputError(f"{name}: got {p[name]!r}; allowed with harmful={EMBEDDED!r}: {words}")
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
        return getattr(self.parameters, "harmful", "") == EMBEDDED

    # ------------------------------------------------------------------------------------------------ models

    @cached_property
    def testbed(self):
        """The testbed of this seed, trained if it is not in the cache. The quick preset has the same model."""
        return self._testbed(self.parameters.model)

    def _testbed(self, model: str):
        from nt_utils import testbed

        with self.run.timed("testbed"):
            made = testbed.build(seed=self.parameters.seed, size=TESTBEDS[model])
        known = {"fingerprint": made.fingerprint, "origin": made.origin, "passed": bool(made.gate["passed"])}
        self.run.record("testbed", known)
        return made

    def load(self, which: str = "model"):
        """Load ``model`` or ``base_model`` (its unaligned counterpart); None when that parameter is ''."""
        from nt_utils import models, testbed
        from nt_utils.interventions import kept

        p = self.parameters
        source = model_source(p, which)
        if not source:
            return None
        kept.keep(self.run.checkpoint("training"), {"machine": machine(), "git": git_revision()})
        quiet = testbed.without_bar() if source in TESTBEDS else contextlib.nullcontext()
        if source in TESTBEDS:
            made = self.testbed if source == p.model else self._testbed(source)
            source = str(made.aligned if which == "model" else made.unaligned)
        with self.run.timed(f"load {which}"), quiet:
            lm = models.load(source, dtype=p.dtype, device_map=p.device_map, **text_options(p))
        self.run.record(f"{which} weights", lm.weights_fingerprint)
        if file := models.gguf.origin(models.located(source)):
            self.run.record(f"{which} file", file)
        self.run.record(f"{which} text", {**lm.text_identity, "template": lm.template_name})
        self.run.record(f"{which} precision", f"{str(lm.model.dtype).removeprefix('torch.')} ({lm.dtype_reason})")
        if lm.template_name == "plain" and text_options(p).get("chat_template", "auto") == "auto":
            print(f"{which}: no chat template; its prompts are plain text (chat_template names another)")
        self.run.record(f"{which} architecture", lm.view.space.architecture)
        return lm

    def importance(self, lm, role: str, kinds, positions: str):
        """Exact importance on the prompts of a role, from file when the same scores were made before."""
        from nt_utils.neurons import NeuronScores
        from nt_utils.scoring.importance import importance

        prompts = self.prompts[role]
        key = {"prompts": prompts.fingerprint, "code": code_fingerprint()}
        key["model"] = lm.identity() or uuid.uuid4().hex  # what cannot be identified is computed anew
        model = hashlib.sha256(key["model"].encode()).hexdigest()[:8]  # two models of a run have a file each
        name = f"{role}_{positions}_{'-'.join(kinds)}_{model}"
        path = self.run.path("scores", f"{name}.safetensors")
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
    def splits(self) -> Splits:
        """Which prompt serves what, in every notebook of this study."""
        given = {name: source for name, source in vars(self.parameters).items() if name in SOURCES and source}
        if not self.is_embedded:  # the embedded ones of these go with the embedded harmful prompts only
            given = {k: v for k, v in given.items() if v != EMBEDDED or k not in ("borderline", "second_language")}
        return Splits(given, self.parameters.seed)

    def rows(self, role: str, use: str, n: int | None = None) -> PromptSet:
        """Prompts of a role (harmful, benign, borderline, general, second_language, new_task) that serve a use: detect,
        tune, develop or test. See :mod:`nt_utils.data.splits`."""
        found = self._fitted(role, self.splits.rows(role, use, n))
        self._record(f"{role}, {len(found)} to {use}", found)
        return found

    def _record(self, which: str, prompts: PromptSet) -> None:
        """Keep what identifies prompts as a fact: for provenance, and so that no table made with others is taken over."""
        known = {"n": len(prompts), "fingerprint": prompts.fingerprint[:16], "name": prompts.name}
        self.run.record(f"prompts {which}", known)

    @cached_property
    def prompter(self) -> Prompter:
        """What renders and counts the prompts of the model under study, without its weights."""
        from nt_utils import models

        source = str(self.testbed.aligned) if self.is_testbed else model_source(self.parameters, "model")
        return models.load_prompter(source, **text_options(self.parameters))

    def _fitted(self, role: str, prompts: PromptSet) -> PromptSet:
        """Running text cut to ``general_tokens``; any other prompt refused that leaves no room for an answer."""
        p = self.parameters
        if self.is_embedded or not len(prompts):  # the testbed's own prompts are short
            return prompts
        limits: dict[str, Any] = {"room": getattr(p, "max_new_tokens", 0) or ANSWER_TOKENS}
        if role == "general":
            limits = {"max_tokens": getattr(p, "general_tokens", GENERAL_TOKENS), "cut": True}
        texts = iter(self.prompter.fit(prompts.texts, role=role, **limits))
        return prompts.map(lambda prompt: prompt.replace(text=next(texts)))

    @property
    def n_detect(self) -> int:
        """How many prompts of each role neurons are found with."""
        p = self.parameters
        return getattr(p, "n_detect", getattr(p, "n_calibrate", p.n_test))

    @cached_property
    def prompts(self) -> dict[str, PromptSet]:
        """What neurons are found with, by role: harmful, benign and, where the study has them, general, second_harmful and
        second_benign."""
        n, sets = self.n_detect, {}
        if self.is_embedded:
            sets["harmful"], sets["benign"] = splits.pairs(n, "detect", "en", self.parameters.seed)
        else:
            sets = {role: self.rows(role, "detect", n) for role in ("harmful", "benign")}
        if "second_language" in self.splits and self.is_embedded:
            found = splits.pairs(n, "detect", "de", self.parameters.seed)
            sets["second_harmful"], sets["second_benign"] = found
        elif "second_language" in self.splits:
            sets["second_harmful"] = self.rows("second_language", "detect", n)
        if "general" in self.splits:
            sets["general"] = self.rows("general", "detect", n)
        for role, chosen in sets.items():
            self._record(role, chosen)
        return sets

    @cached_property
    def tuning_prompts(self) -> tuple[PromptSet, PromptSet]:
        """Harmful prompts that learn their refusal and benign ones that learn their answer, n_tune of each.

        Of the embedded benign ones half are how-to requests in the harmful ones' wordings and half other tasks. Without a
        refusal of its own a prompt gets the parameter `refusal`.
        """
        p = self.parameters
        if not self.is_embedded:
            return self._refused(self.rows("harmful", "tune", p.n_tune)), self.rows("benign", "tune", p.n_tune)
        harmful, benign = splits.pairs(p.n_tune, "tune", "en", p.seed)
        others = splits.rows(corpus.utility(60, "train", p.seed), "tune", p.n_tune - p.n_tune // 2, p.seed)
        return harmful, splits.smallest(benign, p.n_tune // 2, p.seed) + others

    @cached_property
    def calibration_prompts(self) -> tuple[PromptSet, PromptSet]:
        """Harmful and benign prompts that unit maps are made from; harmful ones without a refusal get the parameter `refusal`."""
        return self._refused(self.prompts["harmful"]), self.prompts["benign"]

    def _refused(self, prompts: PromptSet) -> PromptSet:
        text = getattr(self.parameters, "refusal", "")
        return prompts.map(lambda prompt: prompt if prompt.refusal else prompt.replace(refusal=text))

    def learning_rows(self, use: str, n: int | None = None) -> tuple[PromptSet, PromptSet]:
        """Given prompts of a use to learn a modulation from: harmful ones, and benign with borderline ones; n of each role."""
        found = [self.rows(role, use, n) for role in ("harmful", "benign", "borderline") if role in self.splits]
        return found[0], PromptSet([p for part in found[1:] for p in part], "benign")

    @cached_property
    def judge(self) -> Judge:
        """Who judges answers to given prompts: the parameter `judge`; answers to embedded prompts are known."""
        from nt_utils.evaluation.model_judge import asked_model, find_judge
        from nt_utils.models.identity import weights_fingerprint

        found = find_judge(getattr(self.parameters, "judge", PHRASES))
        if (model := asked_model(found)) is not None:
            self.run.record("judge weights", weights_fingerprint(model))
        return found

    def suite(self, split: str = "test") -> Suite:
        """What the model is evaluated on, n_test prompts of each kind; split "dev" is for choosing (learning rates, doses)."""
        from nt_utils.evaluation import suite as suites

        p = self.parameters
        n = p.n_test if split == "test" else p.n_dev
        if self.is_embedded:
            whole, sizes = suites.corpus_suite(split, seed=p.seed), {"wrapped": (2 if self.run.is_quick else 4) * n}
            sets = [dataclasses.replace(s, prompts=s.prompts.take(sizes.get(s.name, n), p.seed)) for s in whole.sets]
            limit = QUICK_TOKENS if self.run.is_quick else whole.max_new_tokens
            return suites.Suite(tuple(sets), whole.name, p.max_new_tokens or limit)
        use = "test" if split == "test" else "develop"
        found = {role: self.rows(role, use, n) for role in ("harmful", "benign", "borderline") if role in self.splits}
        text = self.rows("general", "test", n) if use == "test" and "general" in self.splits else None
        built = suites.make_suite(
            harmful=found["harmful"],
            benign=found["benign"],
            borderline=found.get("borderline") or None,
            text=text,
            judge=self.judge,
            attacks=_names(getattr(p, "attacks", "")),
            max_new_tokens=p.max_new_tokens or ANSWER_TOKENS,
            name=study_name(p.model, p.study),
        )
        if split == "test" and "second_language" in self.splits:
            second = self.rows("second_language", "test", n)
            asked_there = suites.SuiteSet("direct-second", second, ("asr", "refusal", "degenerate"), self.judge)
            built = dataclasses.replace(built, sets=(*built.sets, asked_there))
        return built

    @cached_property
    def new_task(self) -> tuple[PromptSet, PromptSet, PromptSet]:
        """Rows of `new_task` to fine-tune on (n_task), others to choose the rate on (n_dev) and to test on (n_test)."""
        p = self.parameters
        sizes = {"tune": p.n_task, "develop": p.n_dev, "test": p.n_test}
        train, dev, test = (self.rows("new_task", use, n) for use, n in sizes.items())
        return train, dev, test
