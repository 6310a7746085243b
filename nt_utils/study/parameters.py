"""Every parameter of every notebook: its type, what is allowed, and its value in each preset."""

from __future__ import annotations

import ast
import datetime
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nt_utils import definitions
from nt_utils.errors import InputError
from nt_utils.files import read_json

TESTBED = "testbed"
#: Models that the project trains itself: id -> size (see nt_utils.testbed.RECIPES).
TESTBEDS = {TESTBED: "default", f"{TESTBED}-large": "large"}
EMBEDDED = "testbed"  # as a prompt source: the corpus that the testbed was made with
QUICK_TOKENS = 36  # of an answer to an embedded prompt in a quick run; the longest in the corpus has 35
#: Parameters that are prompt sources.
SOURCES = tuple(
    "harmful benign general harmful_test benign_test borderline second_language new_task other_harmful".split()
)

#: How much to compute. "quick" shows that every step of every notebook works: the whole testbed study is meant to take
#: under 90 seconds on 2 cores, of which imports are about a third. Its values are the least that does so and support no
#: finding; whoever adds a step to a notebook gives it a quick value as small. "default" is for a first look and what is
#: published so far, "full" takes more prompts, draws and trainings.
PRESETS = ("quick", "default", "full")


@dataclass(frozen=True)
class Parameter:
    """One notebook parameter: its type, what is allowed, and its value in each preset when left at None."""

    kind: type
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    presets: tuple | None = None  # values for quick, default and full; of two the second is for default and full
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
            try:
                datetime.date.fromisoformat(str(value))
            except ValueError as error:
                raise InputError(f"date: got {value!r}; allowed: a day as YYYY-MM-DD") from error
        if isinstance(value, (int, float)) and not self._in_range(value):
            raise InputError(f"{name}: got {value!r}; allowed: {self._allowed()}")
        return value

    def _in_range(self, value: float) -> bool:
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        return math.isfinite(value) and low <= value <= high

    def _allowed(self) -> str:
        words = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[self.kind]
        if self.choices:
            words = "one of " + ", ".join(repr(c) for c in self.choices)
        if self.low is not None and self.high is not None:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            words += f", at least {self.low:g}"
        return f"{words} ({self.help})"


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


_whole, _number = functools.partial(Parameter, int), functools.partial(Parameter, float)


def _text(help: str, *choices: str, presets: tuple | None = None) -> Parameter:
    return Parameter(str, help, choices=choices, presets=presets)


def _many(items: type, help: str, low=None, high=None, choices=(), presets=None, empty=False) -> Parameter:
    return Parameter(list, help, low, high, choices, presets, items, empty)


def _rates(help: str, presets: tuple) -> Parameter:
    return _many(float, help, 1e-9, 1, presets=presets)


def _steps(help: str, presets: tuple) -> Parameter:
    return _many(int, help, 1, presets=presets)


#: Every parameter. A notebook's first cell names those it takes; None means the preset's value.
PARAMETERS: dict[str, Parameter] = {
    "model": _text("'testbed', 'testbed-large', a hub id or a local folder"),
    "base_model": _text("the unaligned counterpart: a hub id, a folder, 'auto' (the testbed's own) or '' to skip"),
    "study": _text("name of the run folder; '' = after the model"),
    "runs": _text("folder that holds the run folders; '' = runs/ of the project"),
    "preset": _text("how much to compute", *PRESETS),
    "seed": _whole("seed of the testbed's training and of every random draw", 0, 2**31 - 1),
    # A quick run supports no finding: whatever a study pins, it takes what is faster here.
    "dtype": _text("precision of the weights", "auto", "float32", "bfloat16", "float16", presets=("auto",)),
    "device_map": _text("where the weights go, as in transformers: 'auto', 'cpu', 'cuda', ..."),
    "system_prompt": _text("system message: '' = the chat template's own, 'none' = none, or its text"),
    "chat_template": _text("'auto' = the tokenizer's; 'vicuna', 'llama-2', 'chatml', 'plain', or a file"),
    "template_arguments": _text(
        "variables of the chat template as name=value, ...; '' = its defaults with thinking off"
    ),
    "date": _text("what the chat template takes for today, as YYYY-MM-DD"),
    "batch_size": _whole("prompts per forward pass", 1, 4096),
    # Of a quick run at most 5 where a study names a length: "I'm sorry, but" shows by then.
    "max_new_tokens": _whole(
        "longest answer in tokens; 0 = 40 on the embedded prompts, else 256", 0, 8192, presets=(5, 0)
    ),
    "harmful": _text("source of harmful prompts; 'testbed' = the embedded ones, matched with the benign ones"),
    "benign": _text("source of benign prompts; 'testbed' = the embedded ones"),
    "general": _text("source of general text for foundation neurons; 'testbed' = the embedded one"),
    "general_tokens": _whole("tokens that running text is cut to, template included", 8, 8192),
    "harmful_test": _text("source of harmful prompts to evaluate on; '' = rows of harmful not used to detect"),
    "benign_test": _text("source of benign prompts to evaluate on; '' = rows of benign not used to detect"),
    "borderline": _text("source of benign prompts that look harmful; '' to skip"),
    "second_language": _text(
        "source of harmful prompts in a second language, '' to skip; 'testbed' goes with harmful='testbed'"
    ),
    "attacks": _text("wrapper attacks for the harmful prompts, comma-separated; '' = none"),
    "judge": _text(
        "judge of answers to given prompts: 'phrases', a classifier or a model, or 'phrases+' and one of these"
    ),
    "n_detect": _whole("prompts to find neurons with", 4, presets=(4, 200)),
    "n_test": _whole("prompts of each kind to evaluate on", 4, presets=(4, 80, 200)),
    "n_dev": _whole("prompts of each kind to choose on (development split)", 2, presets=(2, 32, 48)),
    "top_share": _number("share of a projection's neurons that count as important on one prompt", 1e-4, 1),
    "rho": _number("share of the prompts a neuron must be important for; 1 is the paper's rule", 0.01, 1),
    "share": _number("share of the pool (FFN neurons and o_proj inputs) that is deactivated", 1e-6, 0.5),
    "other_harmful": _text("source of a second set of harmful prompts to evaluate on; '' to skip"),
    "rules": _many(str, "rules of detection", choices=("as published", "as written", "contrast")),
    "top_neurons": _whole("neurons that are looked at one by one", 1, presets=(3, 10, 30)),
    "factorial_dose": _many(
        float,
        "shares of the pool at which what differs between the rules is tried; [] to skip",
        1e-6,
        1,
        presets=([0.01], [0.01], [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]),
        empty=True,
    ),
    "draws": _whole("random control sets of each kind", 2, 1000, presets=(2, 8, 20)),
    "dose": _many(
        float,
        "shares of the pool, for the dose curve",
        1e-6,
        1,
        presets=([0.01], [0.001, 0.003, 0.01, 0.03, 0.1], [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]),
    ),
    "dose_draws": _whole("random sets at each dose", 0, 1000, presets=(1, 2, 8)),
    "direction_layers": _whole(
        "layers, evenly spread below .8 of the depth, that the refusal direction is chosen from; 0 = all, as its paper",
        0,
        presets=(1, 10, 0),
    ),
    "direction_positions": _whole(
        "last template positions that it is chosen from; 0 = all, as its paper", 0, presets=(1, 2, 0)
    ),
    "subset_sizes": _many(int, "numbers of prompts, for the stability study", 2),
    "subset_draws": _whole("random prompt subsets of each size", 2, 1000, presets=(2, 6, 30)),
    "n_calibrate": _whole("prompts of each kind to score units with", 16, presets=(16, 256, 512)),
    "unit_shares": _many(float, "shares of the units that are SCU, UCU and RU; the rest is CU", 1e-4, 0.9),
    "unit_contrast": _text("how scores on safety and utility data are compared", "log ratio", "difference"),
    "unit_score": _text("a unit's score", "weighted variance", "variance", "mean square"),
    "heads": Parameter(bool, "attention heads as units; False for single channels"),
    "replace_by": _text("what pruned units become: their mean on utility data, or zero", "mean", "zero"),
    "unit_draws": _whole("random sets of units for each category", 2, 1000, presets=(2, 8, 12)),
    "growth": _many(
        float,
        "shares along which each group is grown",
        1e-4,
        0.9,
        presets=([0.1], [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3]),
        empty=True,
    ),
    "growth_limits": _many(
        float, "rise of direct ASR that ends SCU, fall of utility that ends UCU, change that RU must not pass", 0, 1
    ),
    "top_cu": _number("share of the complex units that are frozen with SCU; the paper: 0.06", 1e-4, 1),
    "harmful_share": _number(
        "share of harmful rows in the mixed fine-tuning set; 0 to skip it", 0, 0.9, presets=(0.0, 0.1)
    ),
    "sweep_rates": _rates(
        "learning rates of the fine-tuning attack, all of them evaluated", presets=([3e-4], [3e-4], [1e-4, 3e-4])
    ),
    "sweep_steps": _steps("steps at which the attacked model is evaluated", presets=([2], [10, 30], [5, 15, 30])),
    "utility_floor": _number("share of its utility that an attacked model must keep to count", 0, 1),
    "align_rates": _rates(
        "learning rates of alignment, chosen from on the development split", presets=([1e-3], [1e-3], [1e-3, 3e-3])
    ),
    "align_steps": _whole("steps of alignment", 1, presets=(4, 24, 40)),
    "align_draws": _whole("random sets of units that are aligned with", 1, 100, presets=(1, 1, 2)),
    "n_tune": _whole("harmful prompts that learn their refusal, and as many benign ones", 2, presets=(12, 50)),
    "refusal": _text("refusal learnt for harmful prompts that come without one"),
    "benign_share": _number("share of benign pairs in every batch; 0 = refusals alone", 0, 0.95),
    "sides": _text("what of a neuron is trained: input rows, output columns or both", "input", "output", "both"),
    "other_sides": _text(
        "sides to compare with, comma-separated: input, output, both; '' = none", presets=("", "both", "input, both")
    ),
    "tune_steps": _steps(
        "steps at which tuning is evaluated; the last one ends it", presets=([1], [6, 12, 24], [4, 8, 16, 32])
    ),
    "tune_batch": _whole("pairs a training step", 1, 4096, presets=(2, 12)),
    "rates": _rates(
        "learning rates of neurons and LoRA, chosen from on the development split", presets=([0.01], [0.005, 0.02])
    ),
    "full_rates": _rates(
        "learning rates of full fine-tuning, chosen from likewise", presets=([0.0005], [0.0003, 0.001])
    ),
    "baselines": _text("other ways of tuning: full, lora, comma-separated; '' = none"),
    "target": _number("harmful score on the development split that every way of tuning has to reach", 0, 1),
    "tune_draws": _whole("random sets that are tuned, for each rule", 1, 100, presets=(1, 1, 3)),
    "trainings": _whole("trainings with other orders of the rows", 1, 100, presets=(1, 1, 3)),
    "compared": _many(
        str, "definitions whose neurons are zeroed", choices=DEFINITIONS, presets=(["contrast"], list(DEFINITIONS))
    ),
    "compared_further": _many(
        str,
        "definitions whose neurons are amplified, trained and frozen too",
        choices=DEFINITIONS,
        presets=(["contrast"], ["contrast", "SCU", "attribution"], list(DEFINITIONS)),
    ),
    "n_compare": _whole("prompts of each kind where many interventions are compared", 4, presets=(4, 32, 150)),
    "halves": _whole("pairs of disjoint halves of the calibration prompts", 2, presets=(2, 6, 30)),
    "set_sizes": _many(float, "sizes of the sets whose agreement is measured, shares of the pool", 1e-4, 0.5),
    "utility_shares": _many(
        float,
        "shares that a set difference leaves out as useful, chosen from on the development split",
        0,
        0.9,
        presets=([0.1], [0.05, 0.2], [0.05, 0.1, 0.2, 0.4]),
    ),
    "factor": _number("what amplified activations are multiplied by", 1, 10),
    "control_draws": _whole("random control sets of each definition", 1, 1000, presets=(1, 2, 10)),
    "exact_prompts": _whole(
        "prompts on which every neuron is zeroed alone; 0 = a first-order estimate", 0, presets=(0, 0, 4)
    ),
    "effort_rate": _number("learning rate of training only one definition's neurons", 1e-9, 1),
    "effort_steps": _whole("steps of it", 1, presets=(2, 16, 40)),
    "train_share": _number("share of the pool that is trained alone", 1e-4, 0.5),
    "freeze_share": _number("share of the pool that is frozen under attack", 1e-4, 0.5),
    "harmful_rows": _whole("of the attack's rows those that are harmful requests with their answers", 0),
    "attack_rate": _number("learning rate of the fine-tuning attack on frozen neurons", 1e-9, 1),
    "attack_steps": _whole("steps of it", 1, presets=(2, 8, 20)),
    "defended": _many(
        str,
        "defences that are compared",
        choices=DEFENCES,
        presets=(["SN-Tune", "NeuronTune, safety-first"], list(DEFENCES)),
    ),
    "defence_share": _number("share of the pool that SN-Tune and RSN-Tune train as a defence", 1e-4, 0.5),
    "floor": _number("share of its utility that a model under a fine-tuning attack has to keep", 0, 1),
    "n_defence": _whole(
        "embedded harmful prompts of each attack class that defences learn from", 4, presets=(4, 24, 60)
    ),
    "defence_rates": _rates(
        "learning rates of neurons and LoRA as a defence, chosen from on the development split",
        presets=([3e-3], [3e-3], [3e-4, 1e-3, 3e-3, 1e-2]),
    ),
    "defence_full_rates": _rates(
        "learning rates of full fine-tuning as a defence, chosen from likewise",
        presets=([3e-4], [3e-4], [1e-4, 3e-4, 1e-3]),
    ),
    "defence_steps": _steps("steps of it, chosen from likewise", presets=([2], [16], [20, 40])),
    "strengths": _many(float, "strengths of the refusal direction, chosen from likewise", 0, 10),
    "defence_attacks": _many(
        int,
        "harmful rows in each fine-tuning attack on the defences; 0 = a harmless task alone",
        0,
        presets=([0], [0, 4]),
    ),
    "defence_attack_rates": _rates("learning rates of it; the worst counts", presets=([3e-4], [3e-4], [3e-4, 1e-3])),
    "defence_attack_steps": _steps("steps of it; the worst counts", presets=([2], [8], [10, 20, 40])),
    "gcg_prompts": _whole(
        "harmful requests for which GCG seeks a suffix against every defence; 0 to skip", 0, presets=(1, 0, 16)
    ),
    "gcg_steps": _whole("steps of GCG for each of them", 1, presets=(1, 100)),
    "gcg_width": _whole("candidates that a step of GCG tries", 1, presets=(8, 128)),
    "new_task": _text("source of the task of later fine-tuning; 'testbed' = subtraction; '' to skip"),
    "n_task": _whole("rows of the new task", 4),
    "task_steps": _steps("steps at which later fine-tuning is evaluated", presets=([3], [10, 30], [10, 20, 40])),
    "task_rates": _rates(
        "learning rates of later fine-tuning, of which the one that learns the task best is taken",
        presets=([0.001], [0.001], [0.0003, 0.001]),
    ),
    "n_learn": _whole("embedded harmful prompts of each attack class to learn alpha from", 4, presets=(4, 60)),
    "n_attacked": _whole("prompts inside attacks to evaluate on", 8, presets=(8, 240, 480)),
    "steering_strengths": _many(
        float, "multiples of the refusal direction", presets=([0.5], [0.25, 0.5], [0.25, 0.5, 1.0])
    ),
    "layer_factors": _many(
        float, "factors of one whole layer", 0, 3, presets=([0.8], [0.8, 1.25], [0.7, 0.85, 1.2, 1.5])
    ),
    "n_attribution": _whole("requests to attribute, for each role", 4, presets=(4, 12, 24)),
    "attribution_steps": _whole(
        "points on each attribution path; 0 = attribution patching, one backward pass", 0, presets=(1, 4, 8)
    ),
    "n_support": _whole(
        "prompts of each attack class, and as many benign ones, in an inner and in an outer step", 1, presets=(1, 3)
    ),
    "iterations": _whole("outer steps of learning alpha", 1, presets=(1, 10, 20)),
    "inner_share": _number("share by which the inner step should lower the support loss", 0.01, 0.9),
    "learnt_draws": _whole("random neuron sets that alpha is learnt for", 1, presets=(1, 1, 3)),
    "unseen_classes": _whole("unseen attack classes to adapt to", 1, presets=(1, 2, 8)),
    "dial_shares": _many(
        float,
        "shares of the pool, for the dial's numbers of safety and of utility neurons",
        0,
        0.2,
        presets=([0.0, 0.03], [0.0, 0.03, 0.07], [0.0, 0.015, 0.03, 0.07]),
    ),
    "dial_strengths": _many(float, "strengths of the dial", 0, 3, presets=([1.0], [1.0], [0.5, 1.0])),
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
            value = rule.presets[min(PRESETS.index(preset), len(rule.presets) - 1)]
        checked[name] = rule.check(name, value)
    return SimpleNamespace(**checked)


def notebook_parameters(path: Path) -> dict[str, Any]:
    """What the cell tagged ``parameters`` of a notebook file assigns: name -> value."""
    try:
        cells = read_json(path)["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no notebook ({type(error).__name__})") from error
    for cell in cells:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            return _assigned("".join(cell["source"]))
    raise InputError(f"{path}: has no cell tagged 'parameters'")


def _assigned(source: str) -> dict[str, Any]:
    """The names that a cell assigns, with their values; None for one that is not written out."""
    found: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            try:
                value = ast.literal_eval(node.value or ast.Constant(None))
            except ValueError:
                value = None
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


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


def _safe_assigned(source: str) -> dict[str, Any]:
    try:
        return _assigned(source)
    except SyntaxError:  # a cell with a magic command
        return {}
