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

from nt_utils import batch, parameters, studies
from nt_utils.batch.access import cached_file, has_token, is_local
from nt_utils.batch.step import clock, expected_seconds
from nt_utils.errors import InputError, command, gate_message

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Assumed of one data-centre GPU where runs/bench_gpu.json is missing: half-precision operations a second that a forward
#: pass reaches, bytes a second of reading weights while generating, and exact scoring over the plain forward pass.
ASSUMED = {"operations": 2.5e14, "bandwidth": 1.2e12, "scoring": 3.0}
#: Shape (b) of the bench: tokens of a batch, weights (see bench/setup.py), for the CPU's measured rate.
SHAPE_B = (4 * 64, 2 * (1024 * (2 * 1024 + 2 * 256) + 3 * 1024 * 2816))
#: Published numbers of rows, where a set is small enough to matter.
ROWS = {
    "advbench": 520, "harmbench": 200, "strongreject": 313, "jailbreakbench": 100, "jailbreakbench-benign": 100,
    "maliciousinstruct": 100, "xstest": 250, "xstest-unsafe": 200, "oktest": 300, "multijail": 315,
    "circuit-breakers": 4994, "alpaca": 52002, "dolly": 15011, "gsm8k": 1319, "wikitext": 4358,
}  # fmt: skip
PROMPT_TOKENS = 64  # assumed length of a rendered prompt
GENERATED_AT_ONCE = 32  # assumed rows of a generation batch


# ------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Model:
    """What a config says of a model: parameters (about), layers, bytes of its key-value cache a token; where it was read."""

    name: str
    count: float
    cache: float
    widest: int
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
    return Model(name, layers * layer + tables, 2 * layers * keys * head, max(vocabulary, inner), where)


# ------------------------------------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class Work:
    """What a notebook does with the model: prompts scored, answers generated, training examples; models held at once."""

    scored: float = 0
    answers: float = 0
    trained: float = 0
    models: int = 1
    full_tuning: bool = False


def _suite_size(p: SimpleNamespace) -> int:
    attacks = len([a for a in getattr(p, "attacks", "").split(",") if a.strip()])
    others = sum(bool(getattr(p, name, "")) for name in ("borderline", "second_language"))
    return p.n_test * (2 + attacks + others)


def _work_00(p: SimpleNamespace) -> Work:
    models = 1 + bool(p.base_model)
    return Work(answers=models * _suite_size(p), models=models)


def _work_01(p: SimpleNamespace) -> Work:
    sets = 3 + 2 + 3 * p.draws + len(p.dose) * (2 + p.dose_draws)
    return Work(scored=6 * p.n_detect, answers=2 * p.n_test * sets + 4 * p.n_test)


def _work_02(p: SimpleNamespace) -> Work:
    """About: seven ways of tuning at every rate and step, of which the best are evaluated; later fine-tuning of three."""
    ways = 5 + 2 * p.tune_draws + len([b for b in p.baselines.split(",") if b.strip()])
    runs, checks = ways * len(p.rates), len(p.tune_steps)
    answers = 3 * (runs * checks * p.n_dev + ways * checks * p.n_test)
    trained = runs * max(p.tune_steps) * p.tune_batch + 3 * len(p.task_rates) * max(p.task_steps) * p.tune_batch
    full = "full" in p.baselines
    return Work(
        scored=5 * p.n_detect, answers=answers, trained=trained, models=1 + bool(p.base_model), full_tuning=full
    )


def _work_03(p: SimpleNamespace) -> Work:
    """About: three groups and their random draws pruned, and each group grown on the development split."""
    answers = 2 * p.n_test * (4 + 3 * p.unit_draws) + 2 * p.n_dev * 3 * len(p.growth)
    return Work(scored=8 * p.n_calibrate, answers=answers)


#: Notebook -> its work, from its parameters. A notebook that is not here gets no estimate.
WORK = {
    "00_model_under_study": _work_00,
    "01_safety_neurons": _work_01,
    "02_sn_tune": _work_02,
    "03_ssah_units": _work_03,
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


def rates(root: Path, on_gpu: bool) -> Rates:
    """Measured rates where the bench left them, else assumed ones."""
    gpu, cpu = root / "runs" / "bench_gpu.json", root / "runs" / "bench.json"
    if on_gpu:
        read = f"generation assumed to read {ASSUMED['bandwidth'] / 1e12:g} TB/s of weights"
        if gpu.is_file():
            row = json.loads(gpu.read_text(encoding="utf-8"))[0]
            weights = 6.6e9  # of its Llama-2-7B shape, without the vocabulary
            forward = row["tokens_per_second"] * row["exact_over_forward"]
            measured = f"scoring measured on {row['device']} ({row['date']}, runs/bench_gpu.json)"
            return Rates(
                1 / (2 * weights * forward), 1 / ASSUMED["bandwidth"], row["exact_over_forward"], f"{measured}; {read}"
            )
        assumed = (
            f"assumed: {ASSUMED['operations'] / 1e12:g} TFLOP/s, scoring {ASSUMED['scoring']:g} times the forward pass"
        )
        return Rates(1 / ASSUMED["operations"], 1 / ASSUMED["bandwidth"], ASSUMED["scoring"], f"{assumed}; {read}")
    if cpu.is_file():
        found = json.loads(cpu.read_text(encoding="utf-8"))
        times = sorted(found["milliseconds"]["b"]["forward"])
        tokens, weights = SHAPE_B
        seconds = times[len(times) // 2] / 1e3 / (2 * weights * tokens)
        source = (
            f"measured on this CPU (runs/bench.json, {found['machine']['date']}); generation assumed to read 10 GB/s"
        )
        return Rates(seconds, 1e-10, found["exact_over_forward"]["b"], source)
    return Rates(1 / 1e11, 1e-10, ASSUMED["scoring"], "assumed: 100 GFLOP/s and 10 GB/s of a CPU (make bench measures)")


def seconds_of(work: Work, model: Model, new_tokens: int, dtype: str, rate: Rates) -> float:
    """Expected seconds: scoring and training by operations, generation by reading the weights once a step and batch."""
    token = 2 * model.count * rate.operation
    scoring = work.scored * PROMPT_TOKENS * token * rate.scoring
    training = 3 * work.trained * 2 * PROMPT_TOKENS * token
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
        plan.lines.append(
            "model testbed: 0.92 million parameters, trained once a seed (about 150 s on 2 cores) and cached; CPU"
        )
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
    plan.lines += [f"steps (one GPU; {rate.source})"]
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
    work = WORK[notebook](p)
    new_tokens = getattr(p, "max_new_tokens", 0) or 256
    bytes_ = memory_of(work, model, new_tokens, dtype, getattr(p, "batch_size", 8))
    seconds = seconds_of(work, model, new_tokens, dtype, rate)
    parts = [
        f"{work.scored:.0f} prompts scored" if work.scored else "",
        f"{work.answers:.0f} answers of up to {new_tokens} tokens" if work.answers else "",
        f"{work.trained:.0f} training examples" if work.trained else "",
        f"{work.models} models at once" if work.models > 1 else "",
        "full fine-tuning" if work.full_tuning else "",
    ]
    return bytes_, seconds, f"{', '.join(filter(None, parts))}: {bytes_ / GIB:.0f} GiB, {clock(seconds)}"


def filled(notebook: str, run, preset: str, root: Path) -> SimpleNamespace:
    """A notebook's parameters as it will see them: its defaults, the file's, the preset's."""
    values = defaults(root, notebook) | batch.settings(run, notebook, run.seeds[0], preset, root)
    known = {k: v for k, v in values.items() if k in parameters.PARAMETERS}
    return parameters.check_parameters(known)


def _data_lines(plan: Plan, run, preset: str, root: Path) -> None:
    sources: dict[str, list[str]] = {}
    for notebook in run.notebooks:
        p = vars(filled(notebook, run, preset, root))
        for role in studies.SOURCES:
            if p.get(role) and p[role] != studies.EMBEDDED and role not in sources.setdefault(p[role], []):
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


def resources(file) -> dict[str, int]:
    """What a cluster is asked for a notebook of this study: gpu, mem_mb (of the host), runtime (minutes).

    From the parameter file alone: a GPU with 80 GB holds a model of up to 18 billion half-precision parameters beside its
    unaligned counterpart; a study without facts is taken as one of 8 billion.
    """
    if file.is_small:
        return {"gpu": 0, "mem_mb": 4000, "runtime": 60}
    config = file.facts.get("config")
    billions = sizes(file.name, config, "facts").count / 1e9 if config else 8.0
    gpus = math.ceil(4 * billions / 72)
    return {"gpu": gpus, "mem_mb": int(16000 + 3000 * billions), "runtime": int(60 * (4 + billions))}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m nt_utils.plan --studies llama-3.1-8b-instruct``: what ``make plan`` calls."""
    parser = argparse.ArgumentParser(prog="python -m nt_utils.plan", description="What a study will do, need and take.")
    parser.add_argument("--studies", default="testbed")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--preset", default="default")
    options = parser.parse_args(arguments)
    parameters.PARAMETERS["preset"].check("preset", options.preset)
    seeds = batch.parse_seeds(options.seeds)
    for study in options.studies.replace(",", " ").split():
        print(make_plan(study, seeds, options.preset, studies.project_root()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
