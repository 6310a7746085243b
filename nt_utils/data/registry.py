"""The public prompt sets this project knows by name: where they are on the hub, and how their columns map to prompts.

An entry lists every place it can be read from: the hub (first choice first; some copies are gated and need an accepted
licence) and the file that the original project publishes. Nothing is shipped with this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nt_utils.errors import InputError

Columns = Mapping[str, str | tuple[str, ...]]
"""Prompt field -> column of the data; several columns are joined by a blank line, empty ones left out."""

_GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Place:
    """One place to read a set from.

    id        hub data set id, or the address of a file
    config    hub configuration, "" for the only one
    split     hub split, "" for a file
    columns   how its columns map to prompt fields
    where     column -> value that a row must have (the safe half of XSTest)
    """

    id: str
    columns: Columns
    config: str = ""
    split: str = "train"
    where: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_file(self) -> bool:
        """Whether the place is a file at an address, not a hub data set."""
        return self.id.startswith("http")


@dataclass(frozen=True)
class Entry:
    """One public set: its kind of prompts, its places, its source.

    languages   columns that hold the same prompts in other languages, chosen as `name:column`
    shortest    rows with fewer characters are left out (headings and blank lines of running text)
    words       longer texts are cut to so many words (whole articles of an encyclopaedia)
    own         names of the project's files that no place says; `files` are all names in the folder NT_DATA
    stream      too large to download for a few hundred prompts: read from the front
    """

    name: str
    kind: str
    places: tuple[Place, ...]
    source: str
    licence: str
    languages: tuple[str, ...] = ()
    shortest: int = 0
    words: int = 0
    stream: bool = False
    own: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names that a file of this set may have in the folder NT_DATA, in lower case; * stands for any characters."""
        published = [place.id.rpartition("/")[2].lower() for place in self.places if place.is_file]
        return (*dict.fromkeys([*published, *self.own, f"{self.name}.*", f"{self.name}_*"]),)


def _file(address: str, columns: Columns, **more) -> Place:
    return Place(address, columns, split="", **more)


def _xstest(label: str) -> tuple[Place, ...]:
    columns = {"text": "prompt", "topic": "type"}
    return (
        Place("Paul/XSTest", columns, split="train", where={"label": label}),
        Place("walledai/XSTest", columns, split="test", where={"label": label}),
        _file(f"{_GITHUB}/paul-rottger/xstest/HEAD/xstest_prompts.csv", columns, where={"label": label}),
    )


_JBB = {"text": "Goal", "helpful": "Target", "topic": "Category"}
_MULTIJAIL = ("en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv")

_ENTRIES = (
    Entry(
        "advbench",
        "harmful",
        (
            Place("walledai/AdvBench", {"text": "prompt", "helpful": "target"}),
            _file(
                f"{_GITHUB}/llm-attacks/llm-attacks/HEAD/data/advbench/harmful_behaviors.csv",
                {"text": "goal", "helpful": "target"},
            ),
        ),
        "Zou et al. 2023, Universal and Transferable Adversarial Attacks on Aligned Language Models",
        "MIT",
    ),
    Entry(
        "harmbench",
        "harmful",
        (
            Place("walledai/HarmBench", {"text": "prompt", "topic": "category"}, config="standard"),
            _file(
                f"{_GITHUB}/centerforaisafety/HarmBench/HEAD/data/behavior_datasets/harmbench_behaviors_text_all.csv",
                {"text": ("ContextString", "Behavior"), "topic": "SemanticCategory", "task": "FunctionalCategory"},
                where={"FunctionalCategory": "standard"},
            ),
        ),
        "Mazeika et al. 2024, HarmBench; the 200 standard behaviours",
        "MIT",
    ),
    Entry(
        "strongreject",
        "harmful",
        (
            Place("walledai/StrongREJECT", {"text": "prompt", "topic": "category"}),
            _file(
                f"{_GITHUB}/alexandrasouly/strongreject/HEAD/strongreject_dataset/strongreject_dataset.csv",
                {"text": "forbidden_prompt", "topic": "category"},
            ),
        ),
        "Souly et al. 2024, A StrongREJECT for Empty Jailbreaks",
        "MIT",
    ),
    Entry(
        "jailbreakbench",
        "harmful",
        (Place("JailbreakBench/JBB-Behaviors", _JBB, config="behaviors", split="harmful"),),
        "Chao et al. 2024, JailbreakBench",
        "MIT",
        own=("harmful-behaviors.csv",),
    ),
    Entry(
        "jailbreakbench-benign",
        "borderline",
        (Place("JailbreakBench/JBB-Behaviors", _JBB, config="behaviors", split="benign"),),
        "Chao et al. 2024, JailbreakBench; the benign behaviours of the same topics",
        "MIT",
        own=("benign-behaviors.csv",),
    ),
    Entry(
        "maliciousinstruct",
        "harmful",
        (
            Place("walledai/MaliciousInstruct", {"text": "prompt"}),
            _file(f"{_GITHUB}/Princeton-SysML/Jailbreak_LLM/HEAD/data/MaliciousInstruct.txt", {"text": "text"}),
        ),
        "Huang et al. 2023, Catastrophic Jailbreak of Open-source LLMs via Exploiting Generation",
        "CC BY-SA 4.0 (hub copy)",
    ),
    Entry("xstest", "borderline", _xstest("safe"), "Roettger et al. 2024, XSTest; the 250 safe prompts", "CC BY 4.0"),
    Entry(
        "xstest-unsafe", "harmful", _xstest("unsafe"), "Roettger et al. 2024, XSTest; the 200 contrasts", "CC BY 4.0"
    ),
    Entry(
        "oktest",
        "borderline",
        (_file(f"{_GITHUB}/InvokerStark/OverKill/HEAD/data/OKTest.csv", {"text": "prompt"}),),
        "Shi et al. 2024, Navigating the OverKill in Large Language Models; no copy on the hub is known to us",
        "not stated",
    ),
    Entry(
        "multijail",
        "harmful",
        (Place("DAMO-NLP-SG/MultiJail", {"text": "en", "topic": "tags"}),),
        "Deng et al. 2024, Multilingual Jailbreak Challenges in Large Language Models",
        "MIT",
        languages=_MULTIJAIL,
    ),
    Entry(
        "circuit-breakers",
        "harmful",
        (
            _file(
                f"{_GITHUB}/GraySwanAI/circuit-breakers/HEAD/data/circuit_breakers_train.json",
                {"text": "prompt", "refusal": "llama3_output", "helpful": "output", "topic": "category"},
            ),
            Place(
                "abhayesian/circuit-breakers-dataset", {"text": "prompt", "refusal": "chosen", "helpful": "rejected"}
            ),
        ),
        "Zou et al. 2024, Improving Alignment and Robustness with Circuit Breakers; the detection corpus of SN-Tune",
        "MIT",
    ),
    Entry(
        "beavertails",
        "harmful",
        (
            Place(
                "PKU-Alignment/BeaverTails",
                {"text": "prompt", "helpful": "response"},
                split="30k_test",
                where={"is_safe": "False"},
            ),
        ),
        "Ji et al. 2023, BeaverTails; prompts whose response was labelled unsafe",
        "CC BY-NC 4.0",
    ),
    Entry(
        "alpaca",
        "benign",
        (
            Place("tatsu-lab/alpaca", {"text": ("instruction", "input"), "helpful": "output"}),
            _file(
                f"{_GITHUB}/tatsu-lab/stanford_alpaca/HEAD/alpaca_data.json",
                {"text": ("instruction", "input"), "helpful": "output"},
            ),
        ),
        "Taori et al. 2023, Stanford Alpaca",
        "CC BY-NC 4.0",
    ),
    Entry(
        "dolly",
        "benign",
        (
            Place(
                "databricks/databricks-dolly-15k",
                {"text": ("instruction", "context"), "helpful": "response", "task": "category"},
            ),
        ),
        "Conover et al. 2023, Databricks Dolly 15k",
        "CC BY-SA 3.0",
    ),
    Entry(
        "gsm8k",
        "benign",
        (
            Place(
                "openai/gsm8k",
                {"text": "question", "helpful": "answer", "answer": "answer"},
                config="main",
                split="test",
            ),
            _file(
                f"{_GITHUB}/openai/grade-school-math/HEAD/grade_school_math/data/test.jsonl",
                {"text": "question", "helpful": "answer", "answer": "answer"},
            ),
        ),
        "Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems",
        "MIT",
    ),
    Entry(
        "wikipedia",
        "general",
        (Place("wikimedia/wikipedia", {"text": "text", "topic": "title"}, config="20231101.en"),),
        "Wikimedia, English Wikipedia of 1 November 2023; the foundation corpus of SN-Tune",
        "CC BY-SA 3.0",
        shortest=100,
        words=256,
        stream=True,
    ),
    Entry(
        "wikitext",
        "general",
        (Place("Salesforce/wikitext", {"text": "text"}, config="wikitext-2-raw-v1", split="test"),),
        "Merity et al. 2016, Pointer Sentinel Mixture Models",
        "CC BY-SA 3.0",
        shortest=100,
    ),
)

REGISTRY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def entry(name: str) -> Entry:
    """The entry of this name. Raises InputError that lists the known names."""
    if name not in REGISTRY:
        raise InputError(
            f"unknown prompt set {name!r}: use one of {', '.join(REGISTRY)}, a file or hub:org/name:split:column"
        )
    return REGISTRY[name]
