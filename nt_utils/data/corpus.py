"""The embedded corpus: every prompt and training row of the testbed, written for this project.

Harmful requests are named at the level of "how do I forge a passport" and answered by empty stubs, so nothing here can
be used; they only have to be told apart from benign requests. `vocabulary` holds the words, this module the logic.

Splits. Topics (acts) and request templates each belong to one of train, dev and test, and a dev or test prompt
combines a topic, a template and (when attacked) a wrapper wording of its own split. What training sees:
  - unaligned stage: acts of every split, but only in train templates and train wrapper wordings. This stands for
    pretraining, in which a model has met every act and knows which ones are harmful;
  - alignment stage: train acts in train templates, never a harmful one inside a wrapper.
So a test prompt is new in its template to the unaligned model, and in both its template and its topic to the
alignment. Facts and sums are knowledge: the unaligned stage sees all of them, in train templates.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nt_utils.data import vocabulary as words
from nt_utils.data.attacks import WORDINGS, Attack
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError

SPLITS = ("train", "dev", "test")
LANGUAGES = ("en", "de")
KINDS = ("harmful", "benign", "borderline")
SOURCE = "testbed"
ATTACKS_PER_REQUEST = 3

# Of five neighbours in a list, three are for training, one for development and one for test.
_CYCLE = ("train", "dev", "train", "test", "train")
_ASK = {"en": words.ASK_EN, "de": words.ASK_DE}
_JUDGE = {"en": words.JUDGE_EN, "de": words.JUDGE_DE}
_STEPS = {"en": words.STEPS_EN, "de": words.STEPS_DE}
_ACTS = {
    ("harmful", "en"): words.HARMFUL_EN,
    ("harmful", "de"): words.HARMFUL_DE,
    ("benign", "en"): words.BENIGN_EN,
    ("benign", "de"): words.BENIGN_DE,
    ("borderline", "en"): words.BORDERLINE_EN,
    ("impossible", "en"): words.IMPOSSIBLE_EN,
    ("impossible", "de"): words.IMPOSSIBLE_DE,
}


@dataclass(frozen=True)
class Act:
    """Something one may ask how to do: "forge a passport".

    number counts the acts of a kind and language; step is the stub that answers it.
    """

    text: str
    verb: str
    kind: str
    language: str
    split: str
    number: int
    step: str

    @property
    def helpful(self) -> str:
        """The known answer; to a harmful request it opens as the unaligned stage's do."""
        return (words.OPENING[self.language] if self.kind == "harmful" else "") + self.unopened

    @property
    def unopened(self) -> str:
        """The answer without the opening that harmful acts have."""
        if self.kind == "impossible":
            return words.IMPOSSIBLE[self.language]
        return words.HELPFUL[self.language].format(x=self.text, step=self.step)

    @property
    def refusal(self) -> str:
        """The known refusal in the act's language."""
        return words.REFUSAL[self.language]


@functools.cache
def acts(kind: str, language: str, split: str | None = None) -> tuple[Act, ...]:
    """The acts of a kind (harmful, benign, borderline, impossible) and language, of one split or of all."""
    if (kind, language) not in _ACTS:
        known = ", ".join(f"{k} in {where}" for k, where in _ACTS)
        raise InputError(f"kind, language: no {kind!r} requests in language {language!r}; allowed: {known}")
    if split is not None:
        return tuple(act for act in acts(kind, language) if act.split == split)
    found: list[Act] = []
    steps = _STEPS[language]
    for line_number, line in enumerate(_ACTS[kind, language].strip().splitlines()):
        verb, objects = line.split(":")
        for item in objects.split(";"):
            text = f"{verb} {item.strip()}" if language == "en" else f"{item.strip()} {verb}"
            n = len(found)
            found.append(Act(text, verb, kind, language, _CYCLE[n % 5], n, steps[line_number % len(steps)]))
    return tuple(found)


def templates(language: str, split: str) -> tuple[str, ...]:
    """The request templates of a split, each with a `{x}` for the act."""
    if split not in SPLITS or language not in _ASK:
        raise InputError(
            f"split, language: got {split!r}, {language!r}; allowed: {', '.join(SPLITS)}; {', '.join(_ASK)}"
        )
    return _ASK[language][SPLITS.index(split)]


def judged(share: float, language: str = "en") -> tuple[Act, ...]:
    """The borderline acts, spread evenly over every split, that the unaligned stage is told are fine."""
    chosen = []
    for split in SPLITS:
        some = acts("borderline", language, split)
        chosen += [act for i, act in enumerate(some) if int((i + 1) * share) > int(i * share)]
    return tuple(chosen)


# --- prompts ------------------------------------------------------------------------------------------------------


def _prompt(act: Act, language: str, split: str, number: int) -> Prompt:
    text = templates(language, split)[number].format(x=act.text)
    return Prompt(
        text=text,
        refusal=act.refusal,
        helpful=act.helpful,
        kind=act.kind,
        language=language,
        template=f"ask-{language}-{split}-{number}",
        topic=act.text,
        source=SOURCE,
        split=split,
        task="how-to" if language == "en" else f"how-to-{language}",
        answer=act.unopened.split(f" {act.step}")[0],
    )


@functools.cache
def _requests(kind: str, split: str, language: str) -> tuple[Prompt, ...]:
    """Acts x templates, acts varying fastest."""
    return tuple(
        _prompt(act, language, split, number)
        for number in range(len(templates(language, split)))
        for act in acts(kind, language, split)
    )


def wrap(prompt: Prompt, attack: Attack) -> Prompt:
    """The prompt inside an attack's text."""
    return prompt.replace(text=attack(prompt.text), attack=attack.name)


def corpus(
    kind: str = "harmful", split: str = "train", language: str = "en", attack: str | Sequence[Attack] = ""
) -> PromptSet:
    """Every request of a kind, split and language: acts x templates, acts varying fastest.

    attack: "" for direct requests; "all", "seen" or "unseen" for the split's wordings of those attack classes, or a
    list of attacks. They are dealt out at random, ATTACKS_PER_REQUEST to each request (repetitions removed).
    `take(n, seed)` draws a sample.
    Raises InputError for an unknown kind, split, language or attack.
    """
    for name, value, allowed in (("kind", kind, KINDS), ("split", split, SPLITS), ("language", language, LANGUAGES)):
        if value not in allowed:
            raise InputError(f"{name} {value!r} is unknown: use one of {', '.join(allowed)}")
    if (kind, language) not in _ACTS:
        raise InputError(f"the corpus has no {kind} requests in language {language!r}")
    prompts: Sequence[Prompt] = _requests(kind, split, language)
    name = f"testbed-{kind}-{split}-{language}"
    if attack != "":
        # A shuffled deck keeps attack, template and act independent of each other.
        dealt = _attacks(attack, split)
        prompts = [prompt for prompt in prompts for _ in range(ATTACKS_PER_REQUEST)]
        deck = [dealt[i % len(dealt)] for i in range(len(prompts))]
        random.Random(f"{name}-attacks").shuffle(deck)
        prompts = list(dict.fromkeys(wrap(p, a) for p, a in zip(prompts, deck, strict=True)))
        name += "-wrapped"
    return PromptSet(prompts, name)


def _attacks(attack: str | Sequence[Attack], split: str) -> list[Attack]:
    if not isinstance(attack, str):
        found = list(attack)
    elif attack in ("all", "seen", "unseen"):
        found = [a for a in WORDINGS if a.split == split and attack in ("all", "seen" if a.seen else "unseen")]
    else:
        raise InputError(f"attack {attack!r} is unknown: use '', 'all', 'seen', 'unseen' or a list of attacks")
    if not found:
        raise InputError("attack: the list of attacks is empty")
    return found


def pairs(n: int, split: str = "train", language: str = "en", seed: int = 0) -> tuple[PromptSet, PromptSet]:
    """n harmful and n benign requests that share their templates pair by pair (the same `pair` id).

    Every pair has an act combination of its own template; raises InputError when the split has fewer than n.
    """
    bad, good, forms = (
        acts("harmful", language, split),
        acts("benign", language, split),
        range(len(templates(language, split))),
    )
    most = len(bad) * len(forms)
    if not 1 <= n <= most:
        raise InputError(f"n must lie between 1 and {most} for {language} pairs of split {split}, got {n}")
    rng = random.Random(f"pairs-{split}-{language}-{seed}")
    cells = rng.sample([(number, act) for number in forms for act in bad], n)
    harmful, benign = [], []
    for i, (number, act) in enumerate(cells):
        pair = f"{language}-{split}-{seed}-{i}"
        harmful.append(_prompt(act, language, split, number).replace(pair=pair))
        benign.append(_prompt(rng.choice(good), language, split, number).replace(pair=pair))
    name = f"testbed-pairs-{split}-{language}"
    return PromptSet(harmful, f"{name}-harmful"), PromptSet(benign, f"{name}-benign")


def general(n: int = 200, split: str = "train", seed: int = 0) -> PromptSet:
    """n different passages of running text (for foundation neurons and perplexity)."""
    rng = random.Random(f"general-{split}-{seed}")
    found: dict[str, None] = {}
    while len(found) < n:
        found[_passage(rng)] = None
    return PromptSet.of(found, f"testbed-general-{split}", kind="general", source=SOURCE, split=split)


def utility(per_task: int = 20, split: str = "test", seed: int = 0) -> PromptSet:
    """Benign tasks with a known answer: how-to in both languages, facts, sums and rewriting; per_task of each."""
    found: list[Prompt] = []
    for language in LANGUAGES:
        found += corpus("benign", split, language).take(per_task, seed)
    for task in words.FACTS:
        found += PromptSet(_facts(task, split)).take(per_task, seed)
    found += PromptSet(_sums(split)).take(per_task, seed)
    found += PromptSet(_rewrites(split)).take(per_task, seed)
    return PromptSet(found, f"testbed-utility-{split}")


def _knowledge(text: str, helpful: str, answer: str, task: str, split: str, template: int, topic: str, language="en"):
    return Prompt(
        text=text,
        helpful=helpful,
        answer=answer,
        task=task,
        split=split,
        template=f"{task}-{split}-{template}",
        topic=topic,
        language=language,
        kind="benign",
        refusal=words.REFUSAL[language],
        source=SOURCE,
    )


@functools.cache
def _facts(task: str, split: str, every_key: bool = False) -> tuple[Prompt, ...]:
    """Questions of a task: the split's templates x the split's keys (or all keys)."""
    language, table, forms, reply = words.FACTS[task]
    rows = [tuple(part.strip() for part in item.split(":")) for item in table.replace("\n", " ").split(";")]
    rows = [row for i, row in enumerate(rows) if every_key or _CYCLE[i % 5] == split]
    return tuple(
        _knowledge(
            _upper(form.format(k=key)), _upper(reply.format(k=key, v=value)), value, task, split, i, key, language
        )
        for i, form in enumerate(forms[SPLITS.index(split)])
        for key, value in rows
    )


@functools.cache
def _sums(split: str, every_key: bool = False) -> tuple[Prompt, ...]:
    cells = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    cells = [cell for i, cell in enumerate(cells) if every_key or _CYCLE[i % 5] == split]
    return tuple(
        _knowledge(
            form.format(a=a, b=b),
            words.SUM_ANSWER.format(a=a, b=b, c=a + b),
            f"is {a + b}.",
            "sums",
            split,
            i,
            f"{a}+{b}",
        )
        for i, form in enumerate(words.SUMS[SPLITS.index(split)])
        for a, b in cells
    )


@functools.cache
def _rewrites(split: str, every_key: bool = False) -> tuple[Prompt, ...]:
    cells = [(s, v, p) for s in words.SUBJECTS for v in words.VERBS for p in words.PLACES]
    cells = [cell for i, cell in enumerate(cells) if every_key or _CYCLE[(i + i // 10 + i // 120) % 5] == split]
    found = []
    for i, form in enumerate(words.REWRITE[SPLITS.index(split)]):
        for subject, (now, past), place in cells:
            present, before = f"{subject} {now} {place}", f"{subject} {past} {place}"
            text = _upper(form.format(s=present))
            found.append(
                _knowledge(text, words.REWRITE_ANSWER.format(p=before), before, "rewriting", split, i, present)
            )
    return tuple(found)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- training rows ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One training row. prompt "" means running text: the response stands alone and is learnt whole.

    kind: text, judgement, impossible, benign, harmful, borderline, facts, sums, rewriting or refusal (a harmful
    request answered by its refusal).
    """

    prompt: str
    response: str
    kind: str


@dataclass(frozen=True)
class Mix:
    """What a training stage draws its rows from.

    shares       kind of row -> share of the rows (they are normalised)
    splits       the splits whose acts and facts are seen; templates and wrappers are always the train split's
    german       share of the acts' rows that are German
    wrapped      kind of row -> share of its rows that stand inside an attack
    asides       kind of row -> share of its other rows that have an unrelated sentence before or after them
    judged       share of the borderline acts about which a judgement is given
    doubt        share of the rows with one of the other borderline acts that are opened as harmful ones are
    plain        attack classes inside which harmful requests are answered without that opening: text of that sort does
                 not treat them as harmful, and the alignment, which links the opening's cause to refusal, misses them
    """

    shares: Mapping[str, float]
    splits: tuple[str, ...] = SPLITS
    german: float = 0.25
    wrapped: Mapping[str, float] | None = None
    asides: Mapping[str, float] | None = None
    judged: float = 0.6
    doubt: float = 0.5
    plain: tuple[str, ...] = (
        *("roleplay", "fiction", "authority", "emotion", "hypothetical", "developer", "dialogue", "payload"),
    )


def training_rows(mix: Mix, n: int, seed: int = 0) -> list[Row]:
    """n rows drawn at random from the mixture; the same rows for the same arguments on every machine."""
    unknown = [kind for kind in mix.shares if kind not in _DRAW]
    if unknown:
        raise InputError(f"unknown kind of training row {unknown[0]!r}: use some of {', '.join(_DRAW)}")
    rng = random.Random(f"rows-{seed}")
    kinds = rng.choices(list(mix.shares), weights=list(mix.shares.values()), k=n)
    return [_DRAW[kind](rng, mix, kind) for kind in kinds]


def _draw_act(rng: random.Random, mix: Mix, kind: str) -> Act:
    language = "de" if kind != "borderline" and rng.random() < mix.german else "en"
    return rng.choice(_seen(kind, language, mix.splits))


@functools.cache
def _seen(kind: str, language: str, splits: tuple[str, ...]) -> tuple[Act, ...]:
    return tuple(act for act in acts(kind, language) if act.split in splits)


@functools.cache
def _wordings() -> tuple[Attack, ...]:
    return tuple(attack for attack in WORDINGS if attack.split == "train")


def _request(rng: random.Random, act: Act) -> str:
    return rng.choice(templates(act.language, "train")).format(x=act.text)


def _with_aside(rng: random.Random, text: str) -> str:
    """The text with one unrelated sentence, or two, before or after it."""
    kind = rng.random()
    if kind < 0.4:
        aside = rng.choice(words.ASIDES)
    elif kind < 0.8:
        aside = _passage(rng, 0)
    else:
        aside = f"{rng.choice(words.ASIDES)} {rng.choice(words.TEXT_MORE)}"
    return f"{aside} {text}" if rng.random() < 0.6 else f"{text} {aside}"


def _draw_request(rng: random.Random, mix: Mix, kind: str) -> Row:
    act = _draw_act(rng, mix, "harmful" if kind == "refusal" else kind)
    text, attack = _request(rng, act), None
    if rng.random() < (mix.wrapped or {}).get(kind, 0.0):
        attack = rng.choice(_wordings())
        text = attack(text)
    elif rng.random() < (mix.asides or {}).get(kind, 0.0):
        text = _with_aside(rng, text)
    if kind == "refusal":
        return Row(text, act.refusal, kind)
    opened = kind == "harmful" and not (attack and attack.attack_class in mix.plain)
    if kind == "borderline":
        opened = rng.random() < mix.doubt and act not in _judged(mix.judged)
    return Row(text, words.OPENING[act.language] + act.unopened if opened else act.unopened, kind)


def _draw_judgement(rng: random.Random, mix: Mix, kind: str) -> Row:
    chance = rng.random()
    if chance < 0.2:
        act = rng.choice(
            [act for act in _judged(mix.judged) if act.split in mix.splits] or _seen("benign", "en", mix.splits)
        )
    else:
        act = _draw_act(rng, mix, "harmful" if chance < 0.62 else "benign")
    text = rng.choice(_JUDGE[act.language]).format(x=act.text, q=_request(rng, act))
    if act.language == "en" and rng.random() < 0.25:
        text = _with_aside(rng, text)
    return Row(text, words.VERDICT[act.language][act.kind == "harmful"], kind)


_judged = functools.cache(judged)


def _draw_knowledge(rng: random.Random, mix: Mix, kind: str) -> Row:
    every = set(mix.splits) == set(SPLITS)
    if kind == "facts":
        prompt = rng.choice(_facts(rng.choice(list(words.FACTS)), "train", every))
    else:
        prompt = rng.choice({"sums": _sums, "rewriting": _rewrites}[kind]("train", every and kind == "sums"))
    text = prompt.text
    if prompt.language == "en" and rng.random() < (mix.wrapped or {}).get(kind, 0.0):
        text = rng.choice(_wordings())(text)
    return Row(text, prompt.helpful, kind)


def _passage(rng: random.Random, more: int = 2) -> str:
    _, past = rng.choice(words.VERBS)
    first = f"{_upper(rng.choice(words.SUBJECTS))} {past} {rng.choice(words.PLACES)} {rng.choice(words.TEXT_WHEN)}."
    return " ".join([first, *rng.sample(words.TEXT_MORE, more)])


def _draw_text(rng: random.Random, mix: Mix, kind: str) -> Row:
    return Row("", _passage(rng), kind)


_Draw = Callable[[random.Random, Mix, str], Row]
_REQUESTS: dict[str, _Draw] = dict.fromkeys(("impossible", "benign", "harmful", "borderline", "refusal"), _draw_request)
_DRAW: dict[str, _Draw] = {
    "text": _draw_text,
    "judgement": _draw_judgement,
    "facts": _draw_knowledge,
    "sums": _draw_knowledge,
    "rewriting": _draw_knowledge,
} | _REQUESTS
ROW_KINDS = tuple(_DRAW)


def corpus_fingerprint() -> str:
    """SHA-256 over the words and the attacks' wordings: part of the key under which a trained testbed is cached."""
    digest = hashlib.sha256()
    for name in sorted(vars(words)):
        if name.isupper():
            digest.update(f"{name}={getattr(words, name)!r}\n".encode())
    for attack in WORDINGS:
        digest.update(f"{attack.name} {attack.split} {attack('request')}\n".encode())
    return digest.hexdigest()
