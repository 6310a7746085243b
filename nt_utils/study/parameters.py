"""Every parameter of every notebook: its type, what is allowed, and its value in each preset."""

from __future__ import annotations

import ast
import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nt_utils import definitions
from nt_utils.errors import InputError

TESTBED = "testbed"
#: Models that the project trains itself: id -> size (see nt_utils.testbed.RECIPES).
TESTBEDS = {TESTBED: "default", f"{TESTBED}-large": "large"}
EMBEDDED = "testbed"  # as a prompt source: the corpus that the testbed was made with
QUICK_TOKENS = 36  # of an answer to an embedded prompt in a quick run; the longest in the corpus has 35
#: Parameters that are prompt sources.
SOURCES = (
    "harmful",
    "benign",
    "general",
    "harmful_test",
    "benign_test",
    "borderline",
    "second_language",
    "new_task",
    "other_harmful",
)

#: How much to compute. "quick" shows that every step of every notebook works: the whole testbed study is meant to take
#: under 90 seconds on 2 cores, of which imports are about a third. Its values are the least that does so and support no
#: finding; whoever adds a step to a notebook gives it a quick value as small. "default" is for a first look, "full" for
#: what is published.
PRESETS = ("quick", "default", "full")


@dataclass(frozen=True)
class Parameter:
    """One notebook parameter: its type, what is allowed, and its value in each preset when left at None."""

    kind: type
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    presets: tuple | None = None  # values for quick, default, full
    items: type | None = None  # of a list
    empty: bool = False  # whether a list may be empty

    def check(self, name: str, value: Any) -> Any:
        """Return the value, or raise InputError with one line that names the parameter."""
        if isinstance(value, tuple):
            value = list(value)
        if self.kind is list:
            if not isinstance(value, list) or not (value or self.empty):
                raise InputError(f"{name}: got {value!r}; allowed: a list, not empty ({self.help})")
            one = Parameter(self.items or str, self.help, self.low, self.high, self.choices)
            return [one.check(name, v) for v in value]
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.kind:
            raise InputError(f"{name}: got {value!r} ({type(value).__name__}); allowed: {self._allowed()}")
        if self.choices and value not in self.choices:
            raise InputError(f"{name}: got {value!r}; allowed: {self._allowed()}")
        if name == "date":
            _check_date(str(value))
        if isinstance(value, (int, float)) and not self._in_range(value):
            raise InputError(f"{name}: got {value!r}; allowed: {self._allowed()}")
        return value

    def _in_range(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
        )

    def _allowed(self) -> str:
        words = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[self.kind]
        if self.choices:
            words = "one of " + ", ".join(repr(c) for c in self.choices)
        if self.low is not None and self.high is not None:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            words += f", at least {self.low:g}"
        return f"{words} ({self.help})"


def _check_date(value: str) -> None:
    try:
        datetime.date.fromisoformat(value)
    except ValueError as error:
        raise InputError(f"date: got {value!r}; allowed: a day as YYYY-MM-DD") from error


#: Definitions of a safety neuron that notebook 06 compares.
DEFINITIONS = definitions.names()

DEFENCES = (
    "SN-Tune",
    "RSN-Tune",
    "RU budget",
    "LoRA",
    "full tuning",
    "NeuronTune, safety-first",
    "NeuronTune, utility-first",
    "refusal direction",
    "system prompt",
    "freeze SCU",
    "freeze SCU and top CU",
    "freeze SCU and CU",
)

#: Every parameter. A notebook's first cell names those it takes; None means the preset's value.
PARAMETERS: dict[str, Parameter] = {
    "model": Parameter(str, "'testbed', 'testbed-large', a hub id or a local folder"),
    "base_model": Parameter(
        str, "the unaligned counterpart: a hub id, a folder, 'auto' (the testbed's own) or '' to skip"
    ),
    "study": Parameter(str, "name of the run folder; '' = after the model"),
    "runs": Parameter(str, "folder that holds the run folders; '' = runs/ of the project"),
    "preset": Parameter(str, "how much to compute", choices=PRESETS),
    "seed": Parameter(int, "seed of the testbed's training and of every random draw", low=0, high=2**31 - 1),
    "dtype": Parameter(str, "precision of the weights", choices=("auto", "float32", "bfloat16", "float16")),
    "device_map": Parameter(str, "where the weights go, as in transformers: 'auto', 'cpu', 'cuda', ..."),
    "system_prompt": Parameter(str, "system message: '' = the chat template's own, 'none' = none, or its text"),
    "chat_template": Parameter(str, "'auto' = the tokenizer's; 'vicuna', 'llama-2', 'chatml', 'plain', or a file"),
    "template_arguments": Parameter(
        str, "variables of the chat template as name=value, ...; '' = its defaults with thinking off"
    ),
    "date": Parameter(str, "what the chat template takes for today, as YYYY-MM-DD"),
    "batch_size": Parameter(int, "prompts per forward pass", low=1, high=4096),
    "max_new_tokens": Parameter(
        int, "longest answer in tokens; 0 = 40 on the embedded prompts, else 256", low=0, high=8192
    ),
    "harmful": Parameter(str, "source of harmful prompts; 'testbed' = the embedded ones, matched with the benign ones"),
    "benign": Parameter(str, "source of benign prompts; 'testbed' = the embedded ones"),
    "general": Parameter(str, "source of general text for foundation neurons; 'testbed' = the embedded one"),
    "general_tokens": Parameter(int, "tokens that running text is cut to, template included", low=8, high=8192),
    "harmful_test": Parameter(str, "source of harmful prompts to evaluate on; '' = rows of harmful not used to detect"),
    "benign_test": Parameter(str, "source of benign prompts to evaluate on; '' = rows of benign not used to detect"),
    "borderline": Parameter(str, "source of benign prompts that look harmful; '' to skip"),
    "second_language": Parameter(
        str, "source of harmful prompts in a second language, '' to skip; 'testbed' goes with harmful='testbed'"
    ),
    "attacks": Parameter(str, "wrapper attacks for the harmful prompts, comma-separated; '' = none"),
    "judge": Parameter(
        str, "judge of answers to given prompts: 'phrases', a classifier or a model, or 'phrases+' and one of these"
    ),
    "n_detect": Parameter(int, "prompts to find neurons with", low=4, presets=(16, 200, 200)),
    "n_test": Parameter(int, "prompts of each kind to evaluate on", low=4, presets=(8, 120, 200)),
    "n_dev": Parameter(int, "prompts of each kind to choose on (development split)", low=4, presets=(6, 32, 48)),
    "top_share": Parameter(
        float, "share of a projection's neurons that count as important on one prompt", low=1e-4, high=1
    ),
    "rho": Parameter(
        float, "share of the prompts a neuron must be important for; 1 is the paper's rule", low=0.01, high=1
    ),
    "share": Parameter(
        float, "share of the pool (FFN neurons and o_proj inputs) that is deactivated", low=1e-6, high=0.5
    ),
    "other_harmful": Parameter(str, "source of a second set of harmful prompts to evaluate on; '' to skip"),
    "rules": Parameter(list, "rules of detection", items=str, choices=("as published", "as written", "contrast")),
    "top_neurons": Parameter(int, "neurons that are looked at one by one", low=1, presets=(3, 10, 30)),
    "factorial_dose": Parameter(
        list,
        "shares of the pool at which what differs between the rules is tried; [] to skip",
        items=float,
        low=1e-6,
        high=1,
        presets=([0.01], [0.001, 0.01], [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]),
        empty=True,
    ),
    "draws": Parameter(int, "random control sets of each kind", low=2, high=1000, presets=(2, 8, 20)),
    "dose": Parameter(
        list,
        "shares of the pool, for the dose curve",
        items=float,
        low=1e-6,
        high=1,
        presets=(
            [0.003, 0.1],
            [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1],
            [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1],
        ),
    ),
    "dose_draws": Parameter(int, "random sets at each dose", low=0, high=1000, presets=(1, 2, 8)),
    "direction_layers": Parameter(
        int,
        "layers, evenly spread below .8 of the depth, that the refusal direction is chosen from; 0 = all, as its paper",
        low=0,
        presets=(4, 10, 0),
    ),
    "direction_positions": Parameter(
        int, "last template positions that it is chosen from; 0 = all, as its paper", low=0, presets=(1, 2, 0)
    ),
    "subset_sizes": Parameter(list, "numbers of prompts, for the stability study", items=int, low=2),
    "subset_draws": Parameter(int, "random prompt subsets of each size", low=2, high=1000, presets=(2, 10, 30)),
    "n_calibrate": Parameter(int, "prompts of each kind to score units with", low=16, presets=(32, 512, 512)),
    "unit_shares": Parameter(
        list, "shares of the units that are SCU, UCU and RU; the rest is CU", items=float, low=1e-4, high=0.9
    ),
    "unit_contrast": Parameter(
        str, "how scores on safety and utility data are compared", choices=("log ratio", "difference")
    ),
    "unit_score": Parameter(str, "a unit's score", choices=("weighted variance", "variance", "mean square")),
    "heads": Parameter(bool, "attention heads as units; False for single channels"),
    "replace_by": Parameter(
        str, "what pruned units become: their mean on utility data, or zero", choices=("mean", "zero")
    ),
    "unit_draws": Parameter(int, "random sets of units for each category", low=2, high=1000, presets=(2, 6, 12)),
    "growth": Parameter(
        list,
        "shares along which each group is grown",
        items=float,
        low=1e-4,
        high=0.9,
        presets=([0.01, 0.2], [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3], [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3]),
        empty=True,
    ),
    "growth_limits": Parameter(
        list,
        "rise of direct ASR that ends SCU, fall of utility that ends UCU, change that RU must not pass",
        items=float,
        low=0,
        high=1,
    ),
    "top_cu": Parameter(
        float, "share of the complex units that are frozen with SCU; the paper: 0.06", low=1e-4, high=1
    ),
    "harmful_share": Parameter(
        float,
        "share of harmful rows in the mixed fine-tuning set; 0 to skip it",
        low=0,
        high=0.9,
        presets=(0.0, 0.1, 0.1),
    ),
    "sweep_rates": Parameter(
        list,
        "learning rates of the fine-tuning attack, all of them evaluated",
        items=float,
        low=1e-9,
        high=1,
        presets=([3e-4], [1e-4, 3e-4], [1e-4, 3e-4]),
    ),
    "sweep_steps": Parameter(
        list, "steps at which the attacked model is evaluated", items=int, low=1, presets=([2], [10, 30], [5, 15, 30])
    ),
    "utility_floor": Parameter(float, "share of its utility that an attacked model must keep to count", low=0, high=1),
    "align_rates": Parameter(
        list,
        "learning rates of alignment, chosen from on the development split",
        items=float,
        low=1e-9,
        high=1,
        presets=([1e-3], [1e-3], [1e-3, 3e-3]),
    ),
    "align_steps": Parameter(int, "steps of alignment", low=1, presets=(4, 40, 40)),
    "align_draws": Parameter(int, "random sets of units that are aligned with", low=1, high=100, presets=(1, 1, 2)),
    "n_tune": Parameter(
        int, "harmful prompts that learn their refusal, and as many benign ones", low=2, presets=(12, 50, 50)
    ),
    "refusal": Parameter(str, "refusal learnt for harmful prompts that come without one"),
    "benign_share": Parameter(float, "share of benign pairs in every batch; 0 = refusals alone", low=0, high=0.95),
    "sides": Parameter(
        str, "what of a neuron is trained: input rows, output columns or both", choices=("input", "output", "both")
    ),
    "other_sides": Parameter(
        str,
        "sides to compare with, comma-separated: input, output, both; '' = none",
        presets=("", "both", "input, both"),
    ),
    "tune_steps": Parameter(
        list,
        "steps at which tuning is evaluated; the last one ends it",
        items=int,
        low=1,
        presets=([4], [4, 8, 16, 32], [4, 8, 16, 32]),
    ),
    "tune_batch": Parameter(int, "pairs a training step", low=1, high=4096),
    "rates": Parameter(
        list,
        "learning rates of neurons and LoRA, chosen from on the development split",
        items=float,
        low=1e-9,
        high=1,
        presets=([0.01], [0.005, 0.02], [0.005, 0.02]),
    ),
    "full_rates": Parameter(
        list,
        "learning rates of full fine-tuning, chosen from likewise",
        items=float,
        low=1e-9,
        high=1,
        presets=([0.0005], [0.0003, 0.001], [0.0003, 0.001]),
    ),
    "baselines": Parameter(str, "other ways of tuning: full, lora, comma-separated; '' = none"),
    "target": Parameter(
        float, "harmful score on the development split that every way of tuning has to reach", low=0, high=1
    ),
    "tune_draws": Parameter(int, "random sets that are tuned, for each rule", low=1, high=100, presets=(1, 2, 3)),
    "trainings": Parameter(int, "trainings with other orders of the rows", low=1, high=100, presets=(1, 2, 3)),
    "compared": Parameter(
        list,
        "definitions whose neurons are zeroed",
        items=str,
        choices=DEFINITIONS,
        presets=(["contrast"], list(DEFINITIONS), list(DEFINITIONS)),
    ),
    "compared_further": Parameter(
        list,
        "definitions whose neurons are amplified, trained and frozen too",
        items=str,
        choices=DEFINITIONS,
        presets=(["contrast"], ["contrast", "SCU", "attribution", "activation change"], list(DEFINITIONS)),
    ),
    "n_compare": Parameter(
        int, "prompts of each kind where many interventions are compared", low=4, presets=(6, 40, 150)
    ),
    "halves": Parameter(int, "pairs of disjoint halves of the calibration prompts", low=2, presets=(2, 10, 30)),
    "set_sizes": Parameter(
        list, "sizes of the sets whose agreement is measured, shares of the pool", items=float, low=1e-4, high=0.5
    ),
    "utility_shares": Parameter(
        list,
        "shares that a set difference leaves out as useful, chosen from on the development split",
        items=float,
        low=0,
        high=0.9,
        presets=([0.1], [0.05, 0.2], [0.05, 0.1, 0.2, 0.4]),
    ),
    "factor": Parameter(float, "what amplified activations are multiplied by", low=1, high=10),
    "control_draws": Parameter(int, "random control sets of each definition", low=1, high=1000, presets=(1, 2, 10)),
    "exact_prompts": Parameter(
        int, "prompts on which every neuron is zeroed alone; 0 = a first-order estimate", low=0, presets=(0, 0, 4)
    ),
    "effort_rate": Parameter(float, "learning rate of training only one definition's neurons", low=1e-9, high=1),
    "effort_steps": Parameter(int, "steps of it", low=1, presets=(2, 30, 40)),
    "train_share": Parameter(float, "share of the pool that is trained alone", low=1e-4, high=0.5),
    "freeze_share": Parameter(float, "share of the pool that is frozen under attack", low=1e-4, high=0.5),
    "harmful_rows": Parameter(int, "of the attack's rows those that are harmful requests with their answers", low=0),
    "attack_rate": Parameter(float, "learning rate of the fine-tuning attack on frozen neurons", low=1e-9, high=1),
    "attack_steps": Parameter(int, "steps of it", low=1, presets=(2, 10, 20)),
    "defended": Parameter(
        list,
        "defences that are compared",
        items=str,
        choices=DEFENCES,
        presets=(["SN-Tune", "NeuronTune, safety-first"], list(DEFENCES), list(DEFENCES)),
    ),
    "defence_share": Parameter(
        float, "share of the pool that SN-Tune and RSN-Tune train as a defence", low=1e-4, high=0.5
    ),
    "floor": Parameter(
        float, "share of its utility that a model under a fine-tuning attack has to keep", low=0, high=1
    ),
    "n_defence": Parameter(
        int, "harmful prompts of each attack class that defences learn from", low=8, presets=(8, 24, 60)
    ),
    "defence_rates": Parameter(
        list,
        "learning rates of neurons and LoRA as a defence, chosen from on the development split",
        items=float,
        low=1e-9,
        high=1,
        presets=([3e-3], [3e-3], [3e-4, 1e-3, 3e-3, 1e-2]),
    ),
    "defence_full_rates": Parameter(
        list,
        "learning rates of full fine-tuning as a defence, chosen from likewise",
        items=float,
        low=1e-9,
        high=1,
        presets=([3e-4], [3e-4], [1e-4, 3e-4, 1e-3]),
    ),
    "defence_steps": Parameter(
        list, "steps of it, chosen from likewise", items=int, low=1, presets=([2], [20], [20, 40])
    ),
    "strengths": Parameter(
        list, "strengths of the refusal direction, chosen from likewise", items=float, low=0, high=10
    ),
    "defence_attacks": Parameter(
        list,
        "harmful rows in each fine-tuning attack on the defences; 0 = a harmless task alone",
        items=int,
        low=0,
        presets=([0], [0, 4], [0, 4]),
    ),
    "defence_attack_rates": Parameter(
        list,
        "learning rates of it; the worst counts",
        items=float,
        low=1e-9,
        high=1,
        presets=([3e-4], [3e-4], [3e-4, 1e-3]),
    ),
    "defence_attack_steps": Parameter(
        list, "steps of it; the worst counts", items=int, low=1, presets=([2], [10], [10, 20, 40])
    ),
    "new_task": Parameter(str, "source of the task of later fine-tuning; 'testbed' = subtraction; '' to skip"),
    "n_task": Parameter(int, "rows of the new task", low=4),
    "task_steps": Parameter(
        list, "steps at which later fine-tuning is evaluated", items=int, low=1, presets=([3], [10, 30], [10, 20, 40])
    ),
    "task_rates": Parameter(
        list,
        "learning rates of later fine-tuning, of which the one that learns the task best is taken",
        items=float,
        low=1e-9,
        high=1,
        presets=([0.001], [0.001], [0.0003, 0.001]),
    ),
    "n_learn": Parameter(int, "harmful prompts of each attack class to learn alpha from", low=8, presets=(8, 60, 60)),
    "n_attacked": Parameter(int, "prompts inside attacks to evaluate on", low=8, presets=(12, 360, 480)),
    "steering_strengths": Parameter(
        list, "multiples of the refusal direction", items=float, presets=([0.5], [0.25, 0.5], [0.25, 0.5, 1.0])
    ),
    "layer_factors": Parameter(
        list,
        "factors of one whole layer",
        items=float,
        low=0,
        high=3,
        presets=([0.8], [0.8, 1.25], [0.7, 0.85, 1.2, 1.5]),
    ),
    "n_attribution": Parameter(int, "requests to attribute, for each role", low=4, presets=(4, 12, 24)),
    "attribution_steps": Parameter(int, "points on each attribution path", low=1, presets=(1, 4, 8)),
    "iterations": Parameter(int, "outer steps of learning alpha", low=1, presets=(1, 16, 20)),
    "inner_share": Parameter(float, "share by which the inner step should lower the support loss", low=0.01, high=0.9),
    "learnt_draws": Parameter(int, "random neuron sets that alpha is learnt for", low=1, presets=(1, 2, 3)),
    "unseen_classes": Parameter(int, "unseen attack classes to adapt to", low=1, presets=(1, 3, 8)),
    "dial_shares": Parameter(
        list,
        "shares of the pool, for the dial's numbers of safety and of utility neurons",
        items=float,
        low=0,
        high=0.2,
        presets=([0.0, 0.03], [0.0, 0.03, 0.07], [0.0, 0.015, 0.03, 0.07]),
    ),
    "dial_strengths": Parameter(
        list, "strengths of the dial", items=float, low=0, high=3, presets=([1.0], [1.0], [0.5, 1.0])
    ),
}


def check_parameters(values: Mapping[str, Any]) -> SimpleNamespace:
    """Validate notebook parameters and fill in the preset's values; raises InputError at the first fault."""
    preset = PARAMETERS["preset"].check("preset", values.get("preset", "default"))
    checked = {}
    for name, value in values.items():
        if name not in PARAMETERS:
            raise InputError(
                f"{name}: unknown parameter; known: {', '.join(sorted(values.keys() & PARAMETERS.keys()))}"
            )
        rule = PARAMETERS[name]
        if value is None and rule.presets:
            value = rule.presets[PRESETS.index(preset)]
        checked[name] = rule.check(name, value)
    return SimpleNamespace(**checked)


def notebook_parameters(path: Path) -> list[str]:
    """Names assigned in the cell tagged ``parameters`` of a notebook file."""
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no notebook ({type(error).__name__})") from error
    for cell in cells:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            return _assigned("".join(cell["source"]))
    raise InputError(f"{path}: has no cell tagged 'parameters'")


def _assigned(source: str) -> list[str]:
    names = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [t.id for t in targets if isinstance(t, ast.Name)]
    return names


def from_notebook(history: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a running notebook, from its input history.

    papermill puts overrides into a cell of their own that starts with "# Parameters" and only warns about a name
    the notebook does not have; here such a name is an error.
    """
    injected = [cell for cell in history if cell.startswith("# Parameters\n")]
    own = next((c for c in reversed(history) if c not in injected and "model" in _safe_assigned(c)), "")
    known = _assigned(own)
    for name in (n for cell in injected for n in _assigned(cell)):
        if name not in known:
            raise InputError(f"{name}: unknown parameter; this notebook has {', '.join(known)}")
    return {name: values[name] for name in known}


def _safe_assigned(source: str) -> list[str]:
    try:
        return _assigned(source)
    except SyntaxError:  # a cell with a magic command
        return []
