"""``make plan``: what a study will do, need and take, and what is missing, without loading any weights.

Nothing here knows what a notebook computes: every run counts its work (nt_utils/work.py) into its provenance, and a plan
takes the counts of the same study and preset where it ran before, else those published with the package (work.json,
written by ``python -m nt_utils.study.plan --publish``): the study's own, else the testbed's, scaled to the study's own
numbers of prompts and answer tokens. A model's shapes and the machine's rates turn them into seconds and bytes. Sizes come from the model's config
alone (a local folder, the hub's cache, the hub, or the shapes in the parameter file's ``facts``, in this order).
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nt_utils.errors import InputError, command, gate_message
from nt_utils.files import atomic, project_root, read_json, run_folder, study_name
from nt_utils.study import batch, parameters
from nt_utils.study.batch.access import boxed, cached_file, has_token, is_local
from nt_utils.study.batch.step import expected_seconds
from nt_utils.study.parameters import EMBEDDED, SOURCES
from nt_utils.study.subject import ANSWER_TOKENS
from nt_utils.work import clock
from nt_utils.work import memory as machine_memory

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Published counts: study -> preset -> notebook -> {"work": counts, "parameters": those the counts follow}.
PUBLISHED = Path(__file__).with_name("work.json")
#: Parameters that counts follow, and what a run's provenance says of its cost beside them.
FOLLOWED = ("harmful", "n_detect", "n_calibrate", "n_test", "max_new_tokens")
COSTS = ("peak_bytes", "gpu_peak_bytes", "cpu_seconds")
#: Rates of a GPU, assumed where ``make bench-gpu`` has measured none: operations a second of a forward pass, bytes a second of
#: reading weights while generating; and exact scoring over the plain forward pass, of any device.
ASSUMED_GPU, SCORING = (2.5e14, 1.2e12), 3.0
SLOWER = 1.5  # times float32's time from which on a pinned bfloat16 is spoken of
#: Shape (b) of the bench: tokens of a batch, weights (see nt_utils/bench/setup.py); weights and layers of bench-gpu's 7B shape.
SHAPE_B, SHAPE_7B, LAYERS_7B = (4 * 64, 2 * (1024 * (2 * 1024 + 2 * 256) + 3 * 1024 * 2816)), 6.6e9, 32
#: Bytes beside weights and cache: libraries, logits, the allocator's slack; of notebooks 00 to 03 on the 0.5B model 2.9 GiB.
REST = 3 * GIB
#: Tokens that a backward pass through all layers keeps activations of, in notebooks 05 and 06: so many attacked prompts with
#: their answers, measured on the 0.5B and the 1.5B model.
GRADIENT_TOKENS, GRADIENT_PROMPTS = 1800, 12
#: Answers that are written together, where that was not counted.
ROWS_A_BATCH = 32
#: Forward passes that a token takes: the backward pass has twice the forward's operations, half of them for the weights.
PASSES = {"read": 1.0, "gradient": 2.0, "trained": 2.0, "tuned": 3.0}
#: Mean tokens of a rendered prompt: of the embedded ones in the testbed's own tokenizer, and of others (assumed).
EMBEDDED_TOKENS, PROMPT_TOKENS = 24, 64
#: Longest answer to an embedded prompt, unless max_new_tokens says otherwise; as in evaluation.suite.corpus_suite, which loads torch.
EMBEDDED_ANSWER_TOKENS = 40
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


# ------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Model:
    """What a config says of a model.

    count  parameters (about); cache: values of its key-value cache a token; where: its config was read
    kept   values that a backward pass keeps a token: of the layers, and three copies of the logits
    """

    count: float
    cache: float
    where: str
    kept: float = 0.0

    def weights(self, dtype: str) -> float:
        """Bytes of its weights."""
        return self.count * BYTES.get(dtype, 2)


def config_of(model: str, facts: Mapping[str, Any]) -> tuple[dict, str]:
    """A model's config.json and where it was read; ({}, why not) when it cannot be had."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        file = folder / "config.json"
        return (read_json(file), "local folder") if file.is_file() else ({}, "no config.json")
    if cached := cached_file(model):
        return read_json(cached), "the cache"
    from nt_utils.data.sources import hub_reachable

    why = "the hub cannot be reached and nothing is cached"
    if boxed(model):
        why = "its checkpoint is made when it is first loaded"
    elif hub_reachable():
        from huggingface_hub import hf_hub_download

        try:
            return read_json(Path(hf_hub_download(model, "config.json"))), "the hub"
        except Exception as error:  # whatever the hub client raises, the plan goes on without
            why = f"the hub refuses it ({type(error).__name__})"
    return (dict(facts["config"]), f"the parameter file ({why})") if facts.get("config") else ({}, why)


def sizes(name: str, config: Mapping[str, Any], where: str) -> Model:
    """The sizes that a config tells; biases and norms, less than a thousandth, are left out."""
    config = config.get("text_config", config)
    try:
        hidden = config.get("hidden_size") or config["n_embd"]
        layers = config.get("num_hidden_layers") or config["n_layer"]
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
    kept = layers * (8 * hidden + (matrices + 2) * inner) + 3 * vocabulary
    return Model(layers * layer + tables, 2 * layers * keys * head, where, kept)


# ------------------------------------------------------------------------------------------------- work and time


@dataclass(frozen=True)
class Rates:
    """Seconds an operation and a byte read, exact scoring over the forward pass, and where they come from."""

    operation: float
    byte: float
    scoring: float
    source: str


def rates(root: Path, device: str, dtype: str = "float32") -> Rates:
    """Rates of "gpu" or "cpu": measured where the bench left them in runs/; else a CPU's are measured now, a GPU's assumed.

    On a CPU the bench's forward pass is one in float32; of a study in bfloat16 it takes what ``make bench`` measured of that.
    """
    file = root / "runs" / ("bench_gpu.json" if device == "gpu" else "bench.json")
    found = read_json(file) if file.is_file() else None
    speed, bandwidth = ASSUMED_GPU if device == "gpu" else cpu_rates(dtype)
    how = "assumed" if device == "gpu" else "measured just now"
    read = f"generation reads {bandwidth / 1e9:.3g} GB/s of weights ({how})"
    if device == "cpu" and dtype == "bfloat16" and (faster_by := cpu_rates("float32")[0] / speed) > SLOWER:
        read += f"; this CPU runs float32 {faster_by:.1f} times as fast as the study's bfloat16 (dtype)"
    if device == "gpu" and found:
        row = found[0]
        forward, scoring = row["tokens_per_second"] * row["exact_over_forward"], row["exact_over_forward"]
        source = f"scoring measured on {row['device']} ({row['date']}, runs/bench_gpu.json); {read}"
        weights = SHAPE_7B * row.get("layers", LAYERS_7B) / LAYERS_7B  # a trial takes fewer layers (--layers)
        return Rates(1 / (2 * weights * forward), 1 / bandwidth, scoring, source)
    if device == "cpu" and found and "speed" in found.get("machines", {}):
        times = sorted(found["milliseconds"]["b"]["forward"])
        seconds = times[len(times) // 2] / 1e3 / (2 * SHAPE_B[0] * SHAPE_B[1])
        faster = found.get("bfloat16_over_float32", {}) if dtype == "bfloat16" else {}
        scoring = found["exact_over_forward"]["b"] * faster.get("scoring", 1) / faster.get("forward", 1)
        source = f"measured on this CPU (runs/bench.json, {found['machines']['speed']['date']}); {read}"
        return Rates(seconds * faster.get("forward", 1), 1 / bandwidth, scoring, source)
    bench = "make bench-gpu" if device == "gpu" else "make bench"
    source = (
        f"{how}: {speed / 1e12:.3g} TFLOP/s; scoring assumed at {SCORING:g} forward passes ({bench} measures); {read}"
    )
    return Rates(1 / speed, 1 / bandwidth, SCORING, source)


@functools.cache
def cpu_rates(dtype: str) -> tuple[float, float]:
    """Operations a second of this CPU in matrix products of a prompt's size, and bytes a second of weights read for a few tokens.

    Takes about a second. "auto" counts as float32.
    """
    import torch

    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    weights = torch.ones(16, 2048, 2048, dtype=kind)  # more than a cache holds

    def seconds(rows: int) -> float:
        tokens, took = torch.ones(rows, 2048, dtype=kind), []
        for _ in range(3):
            start = time.perf_counter()
            for matrix in weights:
                torch.nn.functional.linear(tokens, matrix)
            took.append(time.perf_counter() - start)
        return min(took)

    return 2 * 256 * weights.numel() / seconds(256), weights.nbytes / seconds(8)


@dataclass(frozen=True)
class Work:
    """Counts of a notebook's work (see nt_utils/work.py), where they come from, and the parameters they follow."""

    counts: Mapping[str, float]
    source: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def scaled(self, p: SimpleNamespace) -> Work:
        """For a study of other numbers of prompts, longer prompts and longer answers."""
        old = SimpleNamespace(**self.parameters)

        def ratio(*names: str) -> float:
            both = [(getattr(p, name, None), getattr(old, name, None)) for name in names]
            return math.prod(now / then for now, then in both if now and then)

        answers = answer_tokens(p) / answer_tokens(old)
        tokens = _prompt_tokens(p) / _prompt_tokens(old)
        by = {
            "scored": ratio("n_detect", "n_calibrate") * tokens,
            "read": ratio("n_test") * tokens,
            "written": ratio("n_test") * answers,
            "decode": ratio("n_test") * answers,
            "gradient": ratio("n_detect") * tokens,
        }
        return Work({k: n * by.get(k.split("_")[0], tokens) for k, n in self.counts.items()}, self.source)

    @classmethod
    def counted(cls, note: Mapping[str, Any], source: str) -> Work:
        """What a run's provenance says; answers that it took from the cache are counted as if written, at full length."""
        counts = {name: n for name, n in note["work"].items() if name not in COSTS}
        given = {name: value for name, value in note["parameters"].items() if name in FOLLOWED}
        if answers := counts.pop("cached_answers", 0):
            p = SimpleNamespace(**given)
            new = answers * answer_tokens(p)
            added = {
                "read_tokens": answers * _prompt_tokens(p),
                "written_tokens": new,
                "decode_steps": new / ROWS_A_BATCH,
            }
            counts = {name: round(counts.get(name, 0) + added.get(name, 0)) for name in {**counts, **added}}
            source += f", {answers} answers from the cache taken as written anew"
        return cls(counts, source, given)

    def tokens(self, kind: str) -> float:
        """Tokens of a kind of work."""
        return self.counts.get(f"{kind}_tokens", 0)


def _is_embedded(p: SimpleNamespace) -> bool:
    return getattr(p, "harmful", EMBEDDED) == EMBEDDED


def _prompt_tokens(p: SimpleNamespace) -> float:
    return EMBEDDED_TOKENS if _is_embedded(p) else PROMPT_TOKENS


def answer_tokens(p: SimpleNamespace) -> int:
    """Longest answer, in tokens, that a run with these parameters writes."""
    return getattr(p, "max_new_tokens", 0) or (EMBEDDED_ANSWER_TOKENS if _is_embedded(p) else ANSWER_TOKENS)


def work_of(notebook: str, folder: Path, study: str, preset: str, p: SimpleNamespace) -> Work | None:
    """A notebook's work: counted in a run of this study where there is one, else published, of this study or of the testbed,
    scaled; None: unknown. folder: runs/<study>/seed-N."""
    for note in sorted(folder.parent.glob(f"seed-*/provenance/{notebook}.json")):
        if (found := read_json(note)).get("work"):
            return Work.counted(found, "counted when this study last ran").scaled(p)
    published = read_json(PUBLISHED) if PUBLISHED.is_file() else {}
    for name in dict.fromkeys((study, parameters.TESTBED)):
        if entry := published.get(name, {}).get(preset, {}).get(notebook):
            return Work(entry["work"], f"counts of {name}", entry["parameters"]).scaled(p)
    return None


def publish(folder: Path, study: str, preset: str) -> Path:
    """Take the counts of a study's finished run into the package. Raises InputError when none counted its work."""
    found = {}
    for note in sorted((folder / "provenance").glob("*.json")):
        if (content := read_json(note)).get("work"):
            work = Work.counted(content, "")
            found[note.stem] = {"work": work.counts, "parameters": work.parameters}
    if not found:
        raise InputError(f"{folder}: no finished run that counted its work")
    known = read_json(PUBLISHED) if PUBLISHED.is_file() else {}
    known[study] = known.get(study, {}) | {preset: found}
    with atomic(PUBLISHED) as tmp:
        tmp.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return PUBLISHED


def seconds_of(work: Work, model: Model, dtype: str, rate: Rates) -> float:
    """Expected seconds: passes by operations, answers by operations or by reading the weights once a step, whichever is more."""
    token = 2 * model.count * rate.operation
    passes = sum(n * work.tokens(kind) for kind, n in PASSES.items()) + rate.scoring * work.tokens("scored")
    reading = work.counts.get("decode_steps", 0) * model.weights(dtype) * rate.byte
    return passes * token + max(reading, work.tokens("written") * token)


def memory_of(work: Work, model: Model, p: SimpleNamespace, dtype: str) -> float:
    """Expected peak bytes: the models held, what training adds (masters, gradients and two moments in float32: 16 bytes a
    trained parameter), the activations of a batch of gradients, the cache of a batch of answers, and REST."""
    models = 1 + bool(getattr(p, "base_model", ""))
    answering = ROWS_A_BATCH * (_prompt_tokens(p) + answer_tokens(p)) * model.cache * BYTES.get(dtype, 2)
    training = 16 * model.count if work.tokens("tuned") else 0
    prompts = min(getattr(p, "n_attribution", getattr(p, "n_detect", GRADIENT_PROMPTS)), GRADIENT_PROMPTS)
    kept = GRADIENT_TOKENS * prompts / GRADIENT_PROMPTS if work.tokens("gradient") else 0
    return models * model.weights(dtype) + training + kept * model.kept * BYTES.get(dtype, 2) + answering + REST


def filled(notebook: str, run, preset: str, root: Path) -> SimpleNamespace:
    """A notebook's parameters as it will see them: its defaults, the file's, the preset's."""
    values = parameters.notebook_parameters(root / "notebooks" / f"{notebook}.ipynb")
    values |= batch.settings(run, notebook, run.seeds[0], preset, root)
    return parameters.check_parameters({k: v for k, v in values.items() if k in parameters.PARAMETERS})


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
    folders = [f"  runs/{run.folder}/seed-{{{','.join(map(str, run.seeds))}}}" for run in runs]
    count = sum(len(run.seeds) for run in runs)
    plan.lines += [f"study {study}, preset {preset}: {len(steps)} steps in {count} run folders", *folders]
    if file.is_small:
        _small_lines(plan, file, steps, root)
    else:
        _model_lines(plan, file, runs[0], len(steps) / len(runs[0].notebooks), preset, root)
    _data_lines(plan, runs[0], preset, root)
    return plan


def _small_lines(plan: Plan, file, steps: Sequence, root: Path) -> None:
    trains = sum(file.trains(seed) for seed in {seed for _, seed, _ in steps})
    does = f"to be trained for {trains} seeds" if trains else "nothing to train"
    plan.lines += [f"model {file.model}: {does}; CPU", "steps"]
    for run, seed, name in steps:
        output = root / "runs" / run.folder / f"seed-{seed}" / f"{name}.ipynb"
        known = expected_seconds(name, output)
        took = f"{clock(known)} when it last ran" if known else "never ran here"
        plan.lines.append(f"  {run.folder} seed {seed} {name}: {'there' if output.is_file() else 'to do'}; {took}")


def _model_lines(plan: Plan, file, run, times: float, preset: str, root: Path) -> None:
    name, base, facts = file.shared["model"], file.shared.get("base_model", ""), file.facts
    config, where = config_of(name, facts)
    _access(plan, name, bool(facts.get("gated")))
    if base and base != "auto":
        _access(plan, base, bool(facts.get("gated")) or base.startswith("meta-llama/"))
    if not config:
        plan.lines.append(f"model {name}: no size: {where}")
        plan.missing.append(f"the config of {name}: steps and data can be told, memory and time cannot")
        return
    device, model = _device(), sizes(name, config, where)
    dtype = getattr(filled(run.notebooks[0], run, preset, root), "dtype", "auto")
    if (
        dtype == "auto" and not device and not file.is_small
    ):  # as models.precision.choose_dtype decides for a large model
        fits = model.weights("float32") <= 0.8 * machine_memory()[0]
        dtype = max(("float32", "bfloat16"), key=lambda kind: cpu_rates(kind)[0]) if fits else "bfloat16"
    plan.lines.append(
        f"model {name}: about {model.count / 1e9:.2f} billion parameters, {dtype}, {model.weights(dtype) / GIB:.1f} GiB of "
        f"weights (config: {model.where})"
    )
    _disk(plan, [n for n in (name, base) if n and n != "auto"], model.weights("auto"))
    rate = rates(root, "gpu" if device else "cpu", dtype)
    plan.lines.append(f"steps ({device[0] if device else 'the CPU of this machine'}; {rate.source})")
    peak = total = 0.0
    unknown = []
    for notebook in run.notebooks:
        p = filled(notebook, run, preset, root)
        work = work_of(notebook, root / "runs" / run.folder / "seed-0", file.name, preset, p)
        if work is None:
            unknown.append(notebook)
            plan.lines.append(f"  {notebook}: its work has not been counted for this preset")
            continue
        seconds, memory = seconds_of(work, model, dtype, rate), memory_of(work, model, p, dtype)
        peak, total = max(peak, memory), total + seconds
        kinds = {"scored": "scored", "read": "read", "written": "written", "gradient": "for gradients"}
        kinds |= {"trained": "for neurons or adapters", "tuned": "for all weights"}
        parts = [f"{work.tokens(k):.3g} tokens {words}" for k, words in kinds.items() if work.tokens(k)]
        plan.lines.append(f"  {notebook}: {', '.join(parts)}: {memory / GIB:.0f} GiB, {clock(seconds)} ({work.source})")
    beyond = f", beside {len(unknown)} notebooks without counts" if unknown else ""
    plan.lines.append(
        f"  largest {peak / GIB:.0f} GiB; about {clock(total)} a run, {clock(total * times)} in all{beyond}; loading, judging "
        "and drawing not counted"
    )
    if not device:
        plan.missing.append("a GPU: the times above are this CPU's; they need this much of the machine's memory")
    elif device[1] < peak:
        has = f"{device[0]} has {device[1] / GIB:.0f} GiB"
        plan.missing.append(f"GPU memory: {has} (device_map: auto spreads over several GPUs)")


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
    if found := sources.local_file(source):
        return f"{ROWS.get(head, 'many')} prompts as published, from {found}"
    entry = registry.REGISTRY[head]
    where = ", else ".join(place.id for place in entry.places)
    rows = f"{ROWS[head]} prompts" if head in ROWS else "large, read from the front" if entry.stream else "of any size"
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

    if row := boxed(model):
        where = "from the folder NT_MODELS" if row["here"] else "from the hub, else with pip"
        plan.lines.append(f"  {row['bytes'] / GIB:.2f} GiB {where}, made into a checkpoint once")
        return
    if gated and not has_token():
        plan.missing.append(gate_message(model))
    elif gated:
        plan.lines.append(f"{model} is gated; a token is there, whether it has access shows when the hub is asked")
    if not hub_reachable():
        plan.missing.append(f"{model}: not cached, and the hub cannot be reached from here")


def _disk(plan: Plan, models: Sequence[str], each: float) -> None:
    from huggingface_hub import constants

    weights = ("model.safetensors", "model.safetensors.index.json")
    wanted = [m for m in models if not is_local(m) and not any(cached_file(m, name) for name in weights)]
    wanted = [m for m in wanted if not boxed(m)]
    if not wanted:
        return
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    size, room = f"{len(wanted) * each / GIB:.0f} GiB", f"{free / GIB:.0f} GiB free in {folder}"
    plan.lines.append(f"  to download: about {size} ({', '.join(wanted)}); {room}")
    if free < 1.1 * len(wanted) * each:
        plan.missing.append(f"disk: {size} for weights, {room} (HF_HOME moves it)")


@functools.cache
def _device() -> tuple[str, float] | None:
    """Name and bytes of this machine's first GPU, by its driver's own tool: PyTorch is not loaded for it."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        name, mebibytes = done.stdout.splitlines()[0].rsplit(",", 1)
        return name, float(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


# ------------------------------------------------------------------------------------------------ cluster resources


def resources(file, notebook: str = "") -> dict[str, int]:
    """What a cluster is asked for a notebook of this study: gpu, mem_mb (of the host), runtime (minutes).

    From the parameter file and the notebook's defaults alone: a GPU with 80 GB holds a model of up to 18 billion half-precision
    parameters beside its unaligned counterpart, or one of 3.6 billion that is trained whole (16 bytes a parameter beside the
    weights); a study without facts is taken as one of 8 billion.
    """
    if file.is_small:
        return {"gpu": 0, "mem_mb": 4000, "runtime": 60}
    config = file.facts.get("config")
    billions = sizes(file.name, config, "facts").count / 1e9 if config else 8.0
    whole = bool(notebook) and _ever_trains_all(file, notebook, project_root())
    gpus = math.ceil((20 if whole else 4) * billions / 72)
    return {"gpu": gpus, "mem_mb": int(16000 + 3000 * billions), "runtime": int(60 * (4 + billions))}


#: Memory that is kept for a notebook, over what is expected of it.
SPARE = 1.25


def beside(file, run, notebook: str, preset: str, cores: int, free_mb: int, root: Path) -> dict[str, int]:
    """How a notebook shares this machine with the others: its threads, and mem_mb, the memory that is kept for it (MiB).

    The testbed is small: one thread a notebook, and memory is no matter. On a GPU, or where the work is not known, a
    notebook takes every core. On a CPU notebooks run side by side as far as memory goes, with the cores shared among as many
    as fit: most of their time is spent on one token after the other, which more threads hardly speed up.
    """
    if file.is_small:
        return {"threads": 1, "mem_mb": 0}
    alone = {"threads": cores, "mem_mb": 0}
    try:
        config, where = config_of(file.shared["model"], file.facts)
        p = filled(notebook, run, preset, root)
        work = work_of(notebook, root / "runs" / run.folder / "seed-0", file.name, preset, p)
        if not config or work is None or _device():
            return alone
        counts = {**work.counts, "tuned_tokens": float(trains_all(notebook, p))}
        dtype = getattr(p, "dtype", "auto")
        dtype = "float32" if dtype == "auto" else dtype
        memory = memory_of(Work(counts, ""), sizes(file.name, config, where), p, dtype)
    except (InputError, OSError, ValueError, TypeError):  # the step itself says what is wrong
        return alone
    wanted = max(1, int(SPARE * memory / 2**20))
    others = 1 if notebook in batch.LAST and preset != "quick" else len(run.notebooks)
    together = max(1, min(others, free_mb // wanted))
    return {"threads": max(1, cores // together), "mem_mb": min(wanted, free_mb)}


def trains_all(notebook: str, p: SimpleNamespace) -> bool:
    """Whether a notebook fine-tunes all weights of the model with these parameters."""
    arms = f"{getattr(p, 'baselines', '')} {getattr(p, 'defended', '')}"
    return notebook.startswith("04") or bool(getattr(p, "new_task", "")) or "full" in arms


def _ever_trains_all(file, notebook: str, root: Path) -> bool:
    """Whether a notebook fine-tunes all weights in this study, or would with any value of its sweep."""
    given = parameters.notebook_parameters(root / "notebooks" / f"{notebook}.ipynb") | file.parameters(notebook, root)
    given = {name: value for name, value in given.items() if name in parameters.PARAMETERS}
    points = [{}, *({name: value} for name, values in file.sweep.items() if name in given for value in values)]
    return any(trains_all(notebook, parameters.check_parameters(given | point)) for point in points)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m nt_utils.study.plan --studies llama-3.1-8b-instruct``: what ``make plan`` calls."""
    parser = batch.parser("plan", "What a study will do, need and take.")
    parser.add_argument("--publish", action="store_true", help="take the counts of the runs into the package")
    options = parser.parse_args(arguments)
    seeds = batch.parse_seeds(options.seeds)
    for study in batch.parse_names(options.studies):
        if options.publish:
            folder = run_folder("", study_name(study, study, options.preset), seeds[0])
            print(publish(folder, study, options.preset))
        else:
            print(make_plan(study, seeds, options.preset, project_root()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
