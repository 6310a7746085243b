"""A tuned model to ship: alpha folded into the weights, or as an (IA)^3 adapter in PEFT's file format [NT, ours]; what
LoRA learnt as PEFT's adapter.

A channel's alpha multiplies the weights that read the channel (a column of the down or the output projection), so
``W (alpha * x) = (W diag(alpha)) x`` exactly: the folded model is an ordinary checkpoint that any engine serves without
hooks. The same factors, with ones elsewhere, are an (IA)^3 adapter (Liu et al., NeurIPS 2022) whose target modules are
all feed-forward modules. PEFT itself is not needed to write or read it here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nt_utils.errors import InputError, ModelError
from nt_utils.interventions.delta import Delta, LowRank
from nt_utils.interventions.modulation import Modulation
from nt_utils.models import LanguageModel, is_adapter_layer
from nt_utils.neurons import POOL, NeuronSet, Site, same_architecture

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
FORMAT = "nt_utils.ia3.1"
PREFIX = "base_model.model."

# ------------------------------------------------------------------------------------------------------- folding


@contextmanager
def folded(lm: LanguageModel, modulation: Modulation) -> Iterator[LanguageModel]:
    """The model with alpha multiplied into its weights while inside; after it the weights are the old ones, bit for bit.

    The product is taken in float32 and rounded once to the weights' precision.

    Raises:
        InputError: a modulation of another architecture.
        ModelError: an adapter layer, or weights that are offloaded (a meta tensor cannot be folded).
    """
    modulation.check(lm)
    projections = {site: lm.view.projection(*site) for site in modulation.factors}
    before = {projection.parameter: projection.parameter.data for projection in projections.values()}
    try:
        for site, projection in projections.items():
            weight = projection.parameter.data
            factors = modulation.factors[site].to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            factors = factors[:, None] if projection.transposed else factors
            projection.parameter.data = (weight * factors).to(weight.dtype)
        yield lm
    finally:
        for parameter, weight in before.items():
            parameter.data = weight


def fold(lm: LanguageModel, modulation: Modulation, folder) -> Path:
    """Write an ordinary checkpoint (weights, config, tokenizer) with alpha folded in; alpha = 0 is fine.

    The folder appears when it is complete; an existing one is refused. Returns the folder. Raises as :func:`folded`, and
    ModelError where any layer of the model is an adapter's.
    """
    check_plain(lm)
    with new_folder(folder) as unfinished:
        with folded(lm, modulation):
            lm.model.save_pretrained(unfinished)
        lm.tokenizer.save_pretrained(unfinished)
    return Path(folder)


def check_plain(lm: LanguageModel) -> None:
    """Raise ModelError where a layer is an adapter's: transformers would write the adapter alone, or other names."""
    for name, module in lm.model.named_modules():
        if is_adapter_layer(module):
            raise ModelError(f"model: {name} is an adapter layer; merge it first (merge_and_unload)")


@contextmanager
def new_folder(folder) -> Iterator[Path]:
    """An unfinished folder to write into, which gets its name when it is complete; an existing one is refused."""
    target = Path(folder)
    if target.exists():
        raise InputError(f"folder: {target} exists already; name a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------ adapters


def write_adapter(lm: LanguageModel, modulation: Modulation, folder) -> Path:
    """Write an (IA)^3 adapter in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Every down and output projection gets a vector [1, width], ones where nothing was chosen. The fingerprint of the base
    model's weights goes into the file's header; :func:`read_adapter` demands it. Load it elsewhere with
    ``PeftModel.from_pretrained(base, folder)``.

    Raises:
        InputError: another architecture; an existing folder; an alpha of 0 (PEFT divides by alpha when it takes an
            adapter out of the weights: fold instead).
        ModelError: a layer of the model is an adapter's, so that its weights are no base to load this adapter on.
    """
    modulation.check(lm)
    check_plain(lm)
    if (modulation.alpha == 0).any():
        raise InputError(
            "alpha: 0 cannot be exported as (IA)^3, whose removal divides by it; use fold() or a lower bound above 0"
        )
    with new_folder(folder) as unfinished:
        modules = _modules(lm)
        ones = {site: torch.ones(lm.view.space.width(site)) for site in modules}
        factors = ones | dict(modulation.factors)
        tensors = {_key(module): factors[site][None].contiguous() for site, module in modules.items()}
        header = {
            "format": "pt",
            "nt_utils": FORMAT,
            "architecture": modulation.space.architecture,
            "weights": lm.weights_fingerprint,
            "bounds": json.dumps(list(modulation.bounds)),
            "name": modulation.name,
        }
        unfinished.mkdir()
        save_file(tensors, unfinished / WEIGHTS_FILE, metadata=header)
        (unfinished / CONFIG_FILE).write_text(json.dumps(_config(lm, modules), indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def write_lora(lm: LanguageModel, delta: Delta, folder, dtype: torch.dtype = torch.float16) -> Path:
    """Write what LoRA learnt as an adapter in PEFT's format, its factors rounded to ``dtype``.

    ``models.load`` reads the folder as the base model with the adapter merged; the base is called ``lm.name``. The
    fingerprint of the base's weights goes into the file's header: in the same precision, other weights are refused.

    Raises:
        InputError: a delta that is not made of low-rank factors of one scale alone; an existing folder.
    """
    parts = {path.removesuffix(".weight"): part for path, part in delta.parts.items() if isinstance(part, LowRank)}
    scales = {part.scale for part in parts.values()}
    ranks = {part.left.shape[1] for part in parts.values()}
    if len(parts) < len(delta.parts) or len(scales) != 1 or len(ranks) != 1:
        raise InputError("delta: only what LoRA learnt, at one rank and scale, can be written as its adapter")
    rank, scale = ranks.pop(), scales.pop()
    modules = {path: lm.model.get_submodule(path) for path in parts}
    plain = {path for path, module in modules.items() if isinstance(module, torch.nn.Linear)}
    if plain and len(plain) < len(parts):
        raise InputError("delta: layers that store their weights both ways round cannot share an adapter")
    tensors = {}
    for path, part in parts.items():  # PEFT's factors map inputs to outputs; a Conv1D stores the product's transpose
        down, up = (part.right, part.left) if plain else (part.left.t(), part.right.t())
        for name, factor in (("lora_A", down), ("lora_B", up)):
            tensors[f"{PREFIX}{path}.{name}.weight"] = factor.to(dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(parts),
        "fan_in_fan_out": not plain,
        "inference_mode": True,
    }
    with new_folder(folder) as unfinished:
        unfinished.mkdir()
        header = {"format": "pt", "weights": lm.weights_fingerprint, "dtype": str(lm.model.dtype)}
        save_file(tensors, unfinished / WEIGHTS_FILE, metadata=header)
        (unfinished / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def read_adapter(lm: LanguageModel, folder) -> Modulation:
    """The adapter as an intervention; neurons with alpha above 1 stand as its safety set, below 1 as its utility set.

    Raises:
        InputError: no adapter there, a damaged one, one that this package did not write, or one of another base model
            (told by the fingerprint of all weights).
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"adapter: {folder} holds no {WEIGHTS_FILE}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"adapter: {path} is damaged ({str(error).splitlines()[0]})") from error
    if header.get("nt_utils") != FORMAT:
        raise InputError(
            f"adapter: {path} does not name the base model's fingerprint; it was not written by this package"
        )
    space, weights = lm.view.space, header["weights"]
    same_architecture("adapter: made for", header["architecture"], space.architecture)
    if weights != lm.weights_fingerprint:
        raise InputError(f"adapter: made for the weights {weights}; those of {lm.name} are {lm.weights_fingerprint}")
    factors = {}
    for site, module in _modules(lm).items():
        vector, width = tensors.get(_key(module)), space.width(site)
        if vector is None or tuple(vector.shape) != (1, width):
            raise InputError(f"adapter: {path} is damaged: it needs [1, {width}] for {module}")
        factors[site] = vector[0]
    up = NeuronSet(space, {site: vector > 1 for site, vector in factors.items()}, weights)
    down = NeuronSet(space, {site: vector < 1 for site, vector in factors.items()}, weights)
    if not len(up | down):
        raise InputError("adapter: every factor is 1; it changes nothing")
    alpha = torch.stack([factors[layer, kind][index] for layer, kind, index in [*up, *down]])
    return Modulation(up, down, alpha, tuple(json.loads(header["bounds"])), header["name"], weights)


def _modules(lm: LanguageModel) -> dict[Site, str]:
    """site -> the full name of the module that reads it."""
    names = {id(module): name for name, module in lm.model.named_modules()}
    return {site: names[id(lm.view.projection(*site).module)] for site in lm.view.space.sites(POOL)}


def _key(module: str) -> str:
    return f"{PREFIX}{module}.ia3_l"


def _config(lm: LanguageModel, modules: Mapping[Site, str]) -> dict:
    """What PEFT reads. Targets match by the end of a module's name, so the last part of each is enough."""
    targets = sorted({name.rpartition(".")[2] for name in modules.values()})
    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "target_modules": targets,
        "feedforward_modules": targets,
        "fan_in_fan_out": any(lm.view.projection(*site).transposed for site in modules),
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "revision": None,
    }
