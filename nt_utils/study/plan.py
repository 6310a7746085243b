"""``make plan``: what a study will do, need and take, and what is missing, without loading any weights.

Sizes come from the model's config alone (a local folder, the hub's cache, the hub, or the shapes in the parameter file's
``facts``, in this order). Times come from measured rates where ``make bench`` left them in runs/; what is assumed is
called so. GPU memory and hours are of one device, batch sizes as the notebooks choose them.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nt_utils.data.attacks import ATTACKS, FULL_LENGTH
from nt_utils.errors import InputError, command, gate_message
from nt_utils.files import project_root
from nt_utils.study import batch, parameters
from nt_utils.study.batch.access import cached_file, has_token, is_local
from nt_utils.study.batch.step import clock, expected_seconds
from nt_utils.study.parameters import EMBEDDED, SOURCES

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Assumed of one data-centre GPU where runs/bench_gpu.json is missing: half-precision operations a second that a forward
#: pass reaches, bytes a second of reading weights while generating, and exact scoring over the plain forward pass.
ASSUMED = {"operations": 2.5e14, "bandwidth": 1.2e12, "scoring": 3.0}
#: Forward passes that a row takes: of full training (the backward pass has twice the forward's operations), and of a
#: gradient with frozen weights (half of that backward pass). Training neurons alone is measured against full training
#: (nt_utils/bench/tuning.py; 0.38 on a CPU, one row of 64 tokens, 200 million parameters), and taken from runs/bench.json if it is there.
FULL_STEP, GRADIENT, NEURON_STEP = 3.0, 2.0, 0.38
#: Shape (b) of the bench: tokens of a batch, weights (see nt_utils/bench/setup.py), for the CPU's measured rate.
SHAPE_B = (4 * 64, 2 * (1024 * (2 * 1024 + 2 * 256) + 3 * 1024 * 2816))
#: Published numbers of rows, where a set is small enough to matter.
ROWS = {
    "advbench": 520,
    "harmbench": 200,
    "strongreject": 313,
    "jailbreakbench": 100,
    "jailbreakbench-benign": 100,
    "maliciousinstruct": 100,
    "xstest": 250,
    "xstest-unsafe": 200,
    "oktest": 300,
    "multijail": 315,
    "circuit-breakers": 4994,
    "alpaca": 52002,
    "dolly": 15011,
    "gsm8k": 1319,
    "wikitext": 4358,
}
#: What a plan says of the models that the project trains itself.
TESTBEDS = {
    "testbed": "0.92 million parameters, training takes about 150 s on 2 cores",
    "testbed-large": "2.63 million parameters, training takes about 10 min on one core (from ten steps)",
}
PROMPT_TOKENS = 64  # assumed length of a rendered prompt
GENERATED_AT_ONCE = 32  # assumed rows of a generation batch


# ------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Model:
    """What a config says of a model.

    count  parameters (about); cache: values of its key-value cache a token; layers; pool: FFN neurons and o_proj inputs
    where  it was read
    """

    name: str
    count: float
    cache: float
    widest: int
    layers: int
    pool: int
    where: str

    def weights(self, dtype: str) -> float:
        """Bytes of its weights."""
        return self.count * BYTES.get(dtype, 2)


def config_of(model: str, facts: Mapping[str, Any]) -> tuple[dict, str]:
    """A model's config.json and where it was read; ({}, why not) when it cannot be had."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        file = folder / "config.json"
        return (
            (json.loads(file.read_text(encoding="utf-8")), "local folder") if file.is_file() else ({}, "no config.json")
        )
    cached = cached_file(model)
    if cached:
        return json.loads(cached.read_text(encoding="utf-8")), "the hub's cache"
    from nt_utils.data.sources import hub_reachable

    why = "the hub cannot be reached and nothing is cached"
    if hub_reachable():
        from huggingface_hub import hf_hub_download

        try:
            return json.loads(Path(hf_hub_download(model, "config.json")).read_text(encoding="utf-8")), "the hub"
        except Exception as error:  # whatever the hub client raises, the plan goes on without
            why = f"the hub refuses it ({type(error).__name__})"
    return (dict(facts["config"]), f"the parameter file ({why})") if facts.get("config") else ({}, why)


def model_of(name: str, facts: Mapping[str, Any]) -> Model | None:
    """The sizes of a model, or None when its config cannot be had. Raises InputError for a config without sizes."""
    config, where = config_of(name, facts)
    return sizes(name, config, where) if config else None


def sizes(name: str, config: Mapping[str, Any], where: str) -> Model:
    """The sizes that a config tells; biases and norms, less than a thousandth, are left out."""
    config = config.get("text_config", config)
    try:
        hidden, layers = (
            config.get("hidden_size") or config["n_embd"],
            config.get("num_hidden_layers") or config["n_layer"],
        )
        heads = config.get("num_attention_heads") or config["n_head"]
        vocabulary = config["vocab_size"]
    except KeyError as error:
        raise InputError(f"plan: the config of {name} has no {error.args[0]!r}; its size cannot be told") from error
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    keys = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    matrices = 2 if config.get("model_type") in ("gpt2", "gpt_neox") else 3
    layer = hidden * (2 * heads * head + 2 * keys * head) + matrices * hidden * inner
    tables = (1 if config.get("tie_word_embeddings") else 2) * vocabulary * hidden
    pool = layers * (inner + heads * head)
    return Model(name, layers * layer + tables, 2 * layers * keys * head, max(vocabulary, inner), layers, pool, where)


# ------------------------------------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class Work:
    """What a notebook does with the model.

    scored     prompts scored exactly; forwards: prompts that only pass through
    answers    generated
    trained    rows that neurons or adapters learn from; tuned: rows that all weights (or all but some) learn from
    gradients  rows with a gradient while the weights are frozen: attribution, learning alpha
    models     held at once
    """

    scored: float = 0
    forwards: float = 0
    answers: float = 0
    trained: float = 0
    tuned: float = 0
    gradients: float = 0
    models: int = 1

    @property
    def full_tuning(self) -> bool:
        """Whether optimiser state of all weights has to be held."""
        return self.tuned > 0


def _suite_size(p: SimpleNamespace) -> int:
    attacks = len(_names(getattr(p, "attacks", "")))
    others = sum(bool(getattr(p, name, "")) for name in ("borderline", "second_language"))
    return p.n_test * (2 + attacks + others)


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _work_00(p: SimpleNamespace, model: Model) -> Work:
    models = 1 + bool(p.base_model)
    return Work(answers=models * _suite_size(p), models=models)


def _work_01(p: SimpleNamespace, model: Model) -> Work:
    sets = 3 + 2 + 3 * p.draws + len(p.dose) * (2 + p.dose_draws)
    return Work(scored=6 * p.n_detect, answers=2 * p.n_test * sets + 4 * p.n_test)


def _work_02(p: SimpleNamespace, model: Model) -> Work:
    """About: seven ways of tuning at every rate and step, of which the best are evaluated; later fine-tuning of three."""
    full = "full" in p.baselines
    ways = 5 + 2 * p.tune_draws + len(_names(p.baselines))
    checks, rows = len(p.tune_steps), max(p.tune_steps) * p.tune_batch
    tuned = len(p.full_rates) * rows if full else 0
    trained = (ways - full) * len(p.rates) * rows + 3 * len(p.task_rates) * max(p.task_steps) * p.tune_batch
    answers = 3 * (ways * len(p.rates) * checks * p.n_dev + ways * checks * p.n_test)
    return Work(5 * p.n_detect, answers=answers, trained=trained, tuned=tuned, models=1 + bool(p.base_model))


def _work_03(p: SimpleNamespace, model: Model) -> Work:
    """About: three groups and their random draws pruned, and each group grown on the development split."""
    answers = 2 * p.n_test * (4 + 3 * p.unit_draws) + 2 * p.n_dev * 3 * len(p.growth)
    return Work(scored=8 * p.n_calibrate, answers=answers)


def _work_04(p: SimpleNamespace, model: Model) -> Work:
    """Six arms fine-tuned on each set at each rate; four ways of aligning and their draws; three models' statistics."""
    sets, base = 1 + bool(p.harmful_share), bool(p.base_model)
    arms, test, dev = 6, 2 * p.n_test, 2 * p.n_dev
    runs = sets * len(p.sweep_rates)
    answers = test * (1 + sets + arms * runs * len(p.sweep_steps))
    attacked = runs * max(p.sweep_steps) * p.tune_batch
    aligned = base * len(p.align_rates) * p.align_steps * 2 * p.tune_batch
    answers += base * ((3 + p.align_draws) * (len(p.align_rates) * dev + test) + test)
    return Work(
        forwards=(2 + base) * 2 * p.n_detect + (1 + base) * 7 * p.n_test,  # statistics; directions and the probe
        answers=answers,
        trained=attacked + (2 + p.align_draws) * aligned,  # the adapter; units
        tuned=(arms - 1) * attacked + aligned,
        models=1 + base,
    )


def _learning(p: SimpleNamespace, learnt: float) -> tuple[float, float]:
    """Gradient rows and passed prompts of learning alpha so many times: in each iteration of each attack class three rows
    of support and of query, harmful and benign; validation rows every fifth iteration."""
    rows = learnt * p.iterations * _classes() * 12
    return rows, learnt * (p.iterations // 5 + 1) * _development(p)


def _classes() -> int:
    """Attack classes that alpha is learnt from on own prompts, requests without attack among them."""
    return len({ATTACKS[name].attack_class for name in FULL_LENGTH if ATTACKS[name].seen}) + 1


def _development(p: SimpleNamespace) -> int:
    """Validation prompts: every fifth detection prompt, in every class, and as many benign ones."""
    return (_classes() + 1) * (p.n_detect // 5)


def _places(model: Model) -> int:
    """Layers at which the refusal direction is tried: the first 80%."""
    return max(1, int(0.8 * model.layers))


def _work_05(p: SimpleNamespace, model: Model) -> Work:
    """Eleven arms and the ablations on the whole suite or its three main sets, the dial's grid, choices on validation rows."""
    names = [ATTACKS[name] for name in _names(p.attacks) if name in ATTACKS]
    unseen, over = [a for a in names if not a.seen], bool(p.borderline)
    three = p.n_test * (len(unseen) + 1 + over)
    adapted = min(p.unseen_classes, len({a.attack_class for a in unseen}))
    tried = len(p.layer_factors) + _places(model) * len(p.steering_strengths)
    answers = (7 + p.learnt_draws) * _suite_size(p) + tried * _development(p)
    answers += three * (len(p.dial_shares) ** 2 * len(p.dial_strengths) + 4)
    answers += 3 * p.n_test * (adapted * (2 + over) + over)
    rows, passed = _learning(p, 8.59 + p.learnt_draws)  # second-order MAML counts 1.59 (make bench)
    wrappers = sum(ATTACKS[name].seen for name in FULL_LENGTH)
    rows += p.n_attribution * p.attribution_steps * (wrappers + 2)
    return Work(forwards=passed + 2 * p.n_detect, answers=answers + p.n_detect, gradients=rows)


def _work_06(p: SimpleNamespace, model: Model) -> Work:
    """Definitions scored, zeroed, amplified, trained and frozen beside random sets; defences learnt, judged and attacked."""
    base, task = bool(p.base_model), bool(p.new_task)
    zeroed, further, two = len(p.compared), len(p.compared_further), 2 * p.n_compare
    whole, over = p.n_compare * (4 + bool(p.borderline)), p.n_compare * bool(p.borderline)
    answers = 2 * len(p.utility_shares) * p.n_dev + (zeroed + _places(model)) * 2 * p.n_dev + p.n_detect * base
    answers += (zeroed * (3 + p.control_draws) + 2) * two + (zeroed + 2) * over
    answers += (further * (1 + p.tune_draws) + 1) * (whole - p.n_compare)
    answers += len(p.dose) * (zeroed + p.control_draws) * p.n_compare
    effort = further * (1 + p.tune_draws) * 16
    trained, tuned = base * effort * p.effort_steps, task * (effort + 16) * p.attack_steps
    answers += (base + task) * (further * (1 + p.tune_draws) + 1) * two
    wanted, dev = list(p.defended), _development(p)
    neurons = sum(name in ("SN-Tune", "RSN-Tune", "RU budget", "LoRA") for name in wanted) * len(p.defence_rates)
    full = ("full tuning" in wanted) * len(p.defence_full_rates)
    trained += neurons * max(p.defence_steps) * 12
    tuned += full * max(p.defence_steps) * 12
    answers += dev * (neurons + full) * len(p.defence_steps)
    answers += dev * ("refusal direction" in wanted) * _places(model) * len(p.strengths)
    attacks = task * len(p.defence_attacks) * len(p.defence_attack_rates) * (1 + len(wanted))
    answers += (1 + len(wanted)) * whole + attacks * len(p.defence_attack_steps) * two
    tuned += attacks * max(p.defence_attack_steps) * 16
    rows, passed = _learning(p, sum(name.startswith("NeuronTune") for name in wanted))
    rows += 4 * p.n_detect + 24 * 2 * _classes()  # saliency of two kinds; attribution by patching
    passed += (
        4 * p.n_detect + p.exact_prompts * model.pool
    )  # fluctuations, activation change; every neuron zeroed alone
    return Work(5 * p.n_detect, passed, answers, trained, tuned, rows, 1 + base)


#: Notebook -> its work, from its parameters and the model's sizes. A notebook that is not here gets no estimate.
WORK = {
    "00_model_under_study": _work_00,
    "01_safety_neurons": _work_01,
    "02_sn_tune": _work_02,
    "03_ssah_units": _work_03,
    "04_ssah_alignment": _work_04,
    "05_neurontune": _work_05,
    "06_comparison": _work_06,
}


def defaults(root: Path, notebook: str) -> dict[str, Any]:
    """The values in a notebook's parameter cell."""
    cells = json.loads((root / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    nodes = [n for n in ast.parse(source).body if isinstance(n, ast.Assign)]
    return {n.targets[0].id: ast.literal_eval(n.value) for n in nodes if isinstance(n.targets[0], ast.Name)}


@dataclass(frozen=True)
class Rates:
    """Seconds and where they come from: of scoring and training a token a parameter, of generating a step a byte."""

    operation: float
    byte: float
    scoring: float
    source: str
    neurons: float = NEURON_STEP  # a training step of neurons alone over a full one


def rates(root: Path, on_gpu: bool) -> Rates:
    """Measured rates where the bench left them, else assumed ones."""
    gpu, cpu = root / "runs" / "bench_gpu.json", root / "runs" / "bench.json"
    found = json.loads(cpu.read_text(encoding="utf-8")) if cpu.is_file() else {}
    neurons = found.get("sn_step_over_full_step", NEURON_STEP)
    if on_gpu:
        read = f"generation assumed to read {ASSUMED['bandwidth'] / 1e12:g} TB/s of weights"
        if gpu.is_file():
            row = json.loads(gpu.read_text(encoding="utf-8"))[0]
            weights = 6.6e9  # of its Llama-2-7B shape, without the vocabulary
            forward = row["tokens_per_second"] * row["exact_over_forward"]
            measured = f"scoring measured on {row['device']} ({row['date']}, runs/bench_gpu.json)"
            return Rates(
                1 / (2 * weights * forward),
                1 / ASSUMED["bandwidth"],
                row["exact_over_forward"],
                f"{measured}; {read}",
                neurons,
            )
        assumed = (
            f"assumed: {ASSUMED['operations'] / 1e12:g} TFLOP/s, scoring {ASSUMED['scoring']:g} times the forward pass"
        )
        bandwidth = 1 / ASSUMED["bandwidth"]
        return Rates(1 / ASSUMED["operations"], bandwidth, ASSUMED["scoring"], f"{assumed}; {read}", neurons)
    if "milliseconds" in found:
        times = sorted(found["milliseconds"]["b"]["forward"])
        tokens, weights = SHAPE_B
        seconds = times[len(times) // 2] / 1e3 / (2 * weights * tokens)
        source = (
            f"measured on this CPU (runs/bench.json, {found['machine']['date']}); generation assumed to read 10 GB/s"
        )
        return Rates(seconds, 1e-10, found["exact_over_forward"]["b"], source, neurons)
    return Rates(1 / 1e11, 1e-10, ASSUMED["scoring"], "assumed: 100 GFLOP/s and 10 GB/s of a CPU (make bench measures)")


def seconds_of(work: Work, model: Model, new_tokens: int, dtype: str, rate: Rates) -> float:
    """Expected seconds: scoring and training by operations, generation by reading the weights once a step and batch."""
    token = 2 * model.count * rate.operation
    scoring = (work.forwards + work.scored * rate.scoring) * PROMPT_TOKENS * token
    passes = FULL_STEP * (work.tuned + rate.neurons * work.trained) + GRADIENT * work.gradients
    training = passes * 2 * PROMPT_TOKENS * token
    reading = work.answers / GENERATED_AT_ONCE * new_tokens * model.weights(dtype) * rate.byte
    return scoring + training + reading + work.answers * (PROMPT_TOKENS + new_tokens) * token


def memory_of(work: Work, model: Model, new_tokens: int, dtype: str, batch_size: int) -> float:
    """Expected peak bytes: the weights of all models held, plus the larger of generation's cache and scoring's buffers.

    Full fine-tuning adds masters, gradients and two moments in float32: 16 bytes a parameter.
    """
    width = BYTES.get(dtype, 2)
    generating = GENERATED_AT_ONCE * ((PROMPT_TOKENS + new_tokens) * model.cache * width + 4 * model.widest)
    scoring = 4 * batch_size * 4 * PROMPT_TOKENS * model.widest * 4
    tuning = 16 * model.count if work.full_tuning else 0
    return work.models * model.weights(dtype) + max(generating, scoring) + tuning + GIB


# ------------------------------------------------------------------------------------------------------- the plan


@dataclass
class Plan:
    """Lines to print and, apart, what is missing."""

    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        missing = [f"  - {line}" for line in self.missing] or ["  nothing that can be told from here"]
        return "\n".join([*self.lines, "missing", *missing])


def make_plan(study: str, seeds: Sequence[int], preset: str, root: Path) -> Plan:
    """The plan of one study. Raises InputError as the study itself would."""
    file, plan = batch.read(study, root), Plan()
    runs = batch.variants(study, seeds, preset, root)
    steps = [(run, seed, name) for run in runs for seed in run.seeds for name in run.notebooks]
    plan.lines += [
        f"study {study}, preset {preset}: {len(steps)} steps in {sum(len(r.seeds) for r in runs)} run folders"
    ]
    plan.lines += [f"  runs/{run.folder}/seed-{{{','.join(map(str, run.seeds))}}}" for run in runs]
    if file.is_testbed:
        plan.lines.append(f"model {file.model}: {TESTBEDS[file.model]}, trained once a seed and cached; CPU")
        _testbed_times(plan, runs, steps, root)
    else:
        _model_lines(plan, file, runs[0], steps, seeds, preset, root)
    _data_lines(plan, runs[0], preset, root)
    return plan


def _testbed_times(plan: Plan, runs: Sequence, steps: Sequence, root: Path) -> None:
    plan.lines.append("steps")
    for run, seed, name in steps:
        output = root / "runs" / run.folder / f"seed-{seed}" / f"{name}.ipynb"
        known = expected_seconds(name, output)
        state = "there" if output.is_file() else "to do"
        plan.lines.append(
            f"  {run.folder} seed {seed} {name}: {state}; {f'{clock(known)} when it last ran' if known else 'never ran here'}"
        )


def _model_lines(plan: Plan, file, run, steps: Sequence, seeds: Sequence[int], preset: str, root: Path) -> None:
    name, facts = file.shared["model"], file.facts
    base = file.shared.get("base_model", "")
    model = model_of(name, facts)
    _access(plan, name, bool(facts.get("gated")))
    if base and base != "auto":
        _access(plan, base, bool(facts.get("gated")) or base.startswith("meta-llama/"))
    if model is None:
        plan.lines.append(f"model {name}: no size: {config_of(name, facts)[1]}")
        plan.missing.append(f"the config of {name}: steps and data can be told, memory and time cannot")
        return
    dtype = file.shared.get("dtype", "auto")
    stored = model.weights(dtype)
    plan.lines += [
        f"model {name}: about {model.count / 1e9:.2f} billion parameters, {dtype}, {stored / GIB:.1f} GiB of weights",
        f"  its config was read from {model.where}",
    ]
    _disk(plan, [n for n in (name, base) if n and n != "auto"], stored)
    device = _device()
    rate = rates(root, on_gpu=True)
    plan.lines += [f"steps (one GPU; {rate.source})", *_assumptions(rate)]
    peak = total = 0.0
    for notebook in run.notebooks:
        bytes_, seconds, text = _step(notebook, run, model, dtype, rate, preset, root)
        peak, total = max(peak, bytes_), total + seconds
        plan.lines.append(f"  {notebook}: {text}")
    times = len(steps) / len(run.notebooks)
    unknown = sum(name not in WORK for name in run.notebooks)
    beyond = f", beside {unknown} notebooks without an estimate" if unknown else ""
    least = f"  largest {peak / GIB:.0f} GiB of GPU memory; about {clock(total)} a run, {clock(total * times)} in all{beyond}"
    plan.lines.append(least)
    if not device:
        plan.missing.append("a GPU: PyTorch would run this on the CPU, in memory of the same size and far slower")
    elif device[1] < peak:
        plan.missing.append(
            f"GPU memory: {device[0]} has {device[1] / GIB:.0f} GiB (device_map: auto spreads over several GPUs)"
        )


def _step(
    notebook: str, run, model: Model, dtype: str, rate: Rates, preset: str, root: Path
) -> tuple[float, float, str]:
    p = filled(notebook, run, preset, root)
    if notebook not in WORK:
        return 0.0, 0.0, "no estimate for this notebook"
    work = WORK[notebook](p, model)
    new_tokens = getattr(p, "max_new_tokens", 0) or 256
    bytes_ = memory_of(work, model, new_tokens, dtype, getattr(p, "batch_size", 8))
    seconds = seconds_of(work, model, new_tokens, dtype, rate)
    parts = [
        f"{work.scored:.0f} prompts scored" if work.scored else "",
        f"{work.forwards:.0f} prompts passed" if work.forwards else "",
        f"{work.answers:.0f} answers of up to {new_tokens} tokens" if work.answers else "",
        f"{work.gradients:.0f} gradients" if work.gradients else "",
        f"{work.trained:.0f} rows for neurons or adapters" if work.trained else "",
        f"{work.tuned:.0f} rows for all weights" if work.tuned else "",
        f"{work.models} models at once" if work.models > 1 else "",
    ]
    return bytes_, seconds, f"{', '.join(filter(None, parts))}: {bytes_ / GIB:.0f} GiB, {clock(seconds)}"


def _assumptions(rate: Rates) -> list[str]:
    """What every number of seconds and bytes below rests on."""
    return [
        f"  assumed: prompts of {PROMPT_TOKENS} tokens and rows of {2 * PROMPT_TOKENS}; every answer as long as it may be, "
        f"{GENERATED_AT_ONCE} at a time",
        f"  assumed: a row of full training takes {FULL_STEP:g} forward passes of it, of neurons or adapters "
        f"{FULL_STEP * rate.neurons:.2g} (make bench on a CPU), a gradient with frozen weights {GRADIENT:g}",
        "  assumed: 16 bytes a parameter where all weights are trained; loading, judging and drawing take no time",
    ]


def filled(notebook: str, run, preset: str, root: Path) -> SimpleNamespace:
    """A notebook's parameters as it will see them: its defaults, the file's, the preset's."""
    values = defaults(root, notebook) | batch.settings(run, notebook, run.seeds[0], preset, root)
    known = {k: v for k, v in values.items() if k in parameters.PARAMETERS}
    return parameters.check_parameters(known)


def _data_lines(plan: Plan, run, preset: str, root: Path) -> None:
    sources: dict[str, list[str]] = {}
    for notebook in run.notebooks:
        p = vars(filled(notebook, run, preset, root))
        for role in SOURCES:
            if p.get(role) and p[role] != EMBEDDED and role not in sources.setdefault(p[role], []):
                sources[p[role]].append(role)
    plan.lines.append("data" if sources else "data: the embedded corpus")
    for source, roles in sources.items():
        plan.lines.append(f"  {source} ({', '.join(roles)}): {_describe(source, plan)}")


def _describe(source: str, plan: Plan) -> str:
    from nt_utils.data import registry, sources

    head = re.split("[:@]", source)[0]
    if head not in registry.REGISTRY:
        if source.startswith("hub:"):
            return "a hub data set; its size is known once it is read"
        try:
            return f"{len(sources.load_prompts(source))} prompts, a local file"
        except InputError as error:
            plan.missing.append(str(error))
            return "cannot be read"
    if "@" in source:
        return f"{ROWS.get(head, 'many')} prompts as published, from {source.split('@', 1)[1]}"
    entry = registry.REGISTRY[head]
    where = ", else ".join(place.id for place in entry.places)
    rows = (
        f"{ROWS[head]} prompts"
        if head in ROWS
        else "large, read from the front"
        if entry.stream
        else "size not recorded"
    )
    if any(_is_cached(place.id) for place in entry.places):
        return f"{rows}, cached ({where})"
    if not sources.hub_reachable():
        plan.missing.append(f"{head}: not cached and the hub cannot be reached (a local copy: {head}@file)")
    return f"{rows}, not cached; from {where}"


def _is_cached(place: str) -> bool:
    import datasets
    from huggingface_hub import constants

    if place.startswith("http"):
        return False
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / place.replace("/", "___")
    snapshot = Path(constants.HF_HUB_CACHE) / f"datasets--{place.replace('/', '--')}" / "snapshots"
    return any(p.is_dir() and any(p.iterdir()) for p in (prepared, prepared.with_name(prepared.name.lower()), snapshot))


def _access(plan: Plan, model: str, gated: bool) -> None:
    if is_local(model) or cached_file(model):
        return
    from nt_utils.data.sources import hub_reachable

    if gated and not has_token():
        plan.missing.append(gate_message(model))
    elif gated:
        plan.lines.append(f"{model} is gated; a token is there, whether it has access shows when the hub is asked")
    if not hub_reachable():
        plan.missing.append(f"{model}: not cached, and the hub cannot be reached from here")


def _disk(plan: Plan, models: Sequence[str], each: float) -> None:
    from huggingface_hub import constants

    wanted = [m for m in models if not is_local(m) and not _has_weights(m)]
    if not wanted:
        return
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    plan.lines.append(
        f"  to download: about {len(wanted) * each / GIB:.0f} GiB ({', '.join(wanted)}); {free / GIB:.0f} GiB free in {folder}"
    )
    if free < 1.1 * len(wanted) * each:
        plan.missing.append(
            f"disk: {len(wanted) * each / GIB:.0f} GiB for weights, {free / GIB:.0f} GiB free in {folder} (HF_HOME moves it)"
        )


def _has_weights(model: str) -> bool:
    return any(cached_file(model, name) for name in ("model.safetensors", "model.safetensors.index.json"))


def _device() -> tuple[str, float] | None:
    """Name and bytes of this machine's first GPU, by its driver's own tool: PyTorch is not loaded for it."""
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        name, mebibytes = done.stdout.splitlines()[0].rsplit(",", 1)
        return name, float(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


# ------------------------------------------------------------------------------------------------ cluster resources


#: Notebooks that train all weights, whatever their parameters: 16 bytes a parameter beside the weights.
TRAINS_ALL = ("04_ssah_alignment", "06_comparison")


def resources(file, notebook: str = "") -> dict[str, int]:
    """What a cluster is asked for a notebook of this study: gpu, mem_mb (of the host), runtime (minutes).

    From the parameter file alone: a GPU with 80 GB holds a model of up to 18 billion half-precision parameters beside its
    unaligned counterpart, or one of 3.6 billion that is trained whole; a study without facts is taken as one of 8 billion.
    """
    if file.is_small:
        return {"gpu": 0, "mem_mb": 4000, "runtime": 60}
    config = file.facts.get("config")
    billions = sizes(file.name, config, "facts").count / 1e9 if config else 8.0
    gpus = math.ceil((20 if notebook in TRAINS_ALL else 4) * billions / 72)
    return {"gpu": gpus, "mem_mb": int(16000 + 3000 * billions), "runtime": int(60 * (4 + billions))}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m nt_utils.study.plan --studies llama-3.1-8b-instruct``: what ``make plan`` calls."""
    parser = argparse.ArgumentParser(
        prog="python -m nt_utils.study.plan", description="What a study will do, need and take."
    )
    parser.add_argument("--studies", default="testbed")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--preset", default="default")
    options = parser.parse_args(arguments)
    parameters.PARAMETERS["preset"].check("preset", options.preset)
    seeds = batch.parse_seeds(options.seeds)
    for study in options.studies.replace(",", " ").split():
        print(make_plan(study, seeds, options.preset, project_root()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
