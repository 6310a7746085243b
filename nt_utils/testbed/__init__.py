"""The testbed: a small Llama without and with safety, of which the trained weights of seeds 0 to 9 come with the package.

    build(seed=0) -> Testbed(folder, unaligned, aligned, gate, fingerprint, origin, ...)

Both models are ordinary folders in the cache that `AutoModelForCausalLM.from_pretrained` loads: a LlamaForCausalLM with
a byte-level BPE tokenizer and a chat template. How they were trained: see `training`; what is demanded of them: `gate`.

``python -m nt_utils.testbed gates`` shows the shipped ones, ``python -m nt_utils.testbed train --seed 0`` trains one anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from nt_utils.errors import InputError
from nt_utils.files import cache_folder, digest_of, writable
from nt_utils.models import LanguageModel
from nt_utils.testbed.gate import BARS, SHARE, measure_gate
from nt_utils.testbed.training import RECIPES, Recipe, make_tokenizer, new_model, recipe_hash, train

__all__ = ["BARS", "RECIPES", "SHARE", "Testbed", "build", "ship", "shipped", "without_bar"]

WEIGHTS = Path(__file__).parent / "weights"
STAGES = ("unaligned", "aligned")


@dataclass(frozen=True)
class Testbed:
    """A testbed.

    folder       holds unaligned/ and aligned/ and testbed.json
    gate         measured, passed, missed (text), dev and test (tables: name, rate, low, high, n); for the random
                 units low and high are the smallest and the largest of the draws, elsewhere a 95% interval
    fingerprint  16 hex digits of both models' weights
    origin       "shipped" with the package, or "trained" on this machine
    seconds      what training and gate took
    """

    folder: Path
    unaligned: Path
    aligned: Path
    gate: dict[str, Any] = field(repr=False)
    fingerprint: str
    origin: str
    seconds: float


def build(
    seed: int = 0,
    size: str = "default",
    cache: str | os.PathLike | None = None,
    progress: bool = True,
    retrain: bool = False,
) -> Testbed:
    """The testbed of a seed: the shipped weights of the default size, or one trained here and kept in the cache.

    Args:
        seed: of initialisation and training rows.
        size: "default"; "micro" (trained in seconds, learns nothing, for tests); "large" (about three times the
            parameters, trained in about 10 minutes).
        cache: folder of the cache; by default NT_CACHE or nt_utils in the user's cache folder.
        progress: show progress bars while training.
        retrain: train anew although weights are shipped, or were trained here before (about 4 minutes); rounding differs
            between machines, so this is another model than the shipped one.

    A failed gate warns with one line and is recorded. A damaged entry of the cache is made again with a notice. Where the
    shipped weights are damaged, one that was retrained is used with a notice.

    Raises:
        InputError: unknown size, bad seed, a cache that cannot be written, or shipped weights that are damaged or of
            another version of the recipe or corpus.
    """
    if size not in RECIPES:
        raise InputError(f"size {size!r} is unknown: use one of {', '.join(RECIPES)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a whole number of 0 or more, got {seed!r}")
    root = writable((Path(cache).expanduser() if cache is not None else cache_folder()) / "testbed")
    recipe = RECIPES[size]
    key = recipe_hash(recipe, seed)
    folder, record = root / f"{size}-seed{seed}-{key}", None
    if size == "default" and not retrain and str(seed) in shipped()["seeds"]:
        try:
            record = _checked(seed, key)
        except InputError as error:
            if not folder.is_dir():
                raise
            warnings.warn(f"{error}; the testbed that was trained here is used", stacklevel=2)
    wanted = record["fingerprint"] if record else ""
    if record:
        folder = root / f"shipped-seed{seed}-{wanted}"
    with FileLock(str(folder) + ".lock"):
        found = None if retrain else _load(folder, key, wanted)
        if found is None:
            if folder.exists():
                if not retrain:
                    warnings.warn(f"the cached testbed {folder} is damaged and is made again", stacklevel=2)
                shutil.rmtree(folder)
            if record:
                _write(folder, _unpack(seed, record), _tokenizer(), record | {"origin": "shipped"})
            else:
                _train(folder, recipe, key, seed, progress)
            found = _load(folder, key, wanted)
            if found is None:
                raise InputError(f"cache: the testbed written to {folder} cannot be read back")
    if found.gate["missed"]:
        warnings.warn(f"the testbed of seed {seed} misses its gate: {'; '.join(found.gate['missed'])}", stacklevel=2)
    return found


def _load(folder: Path, key: str, wanted: str) -> Testbed | None:
    """The cached testbed, or None when it is missing, damaged or, given ``wanted``, of another fingerprint: each file must
    have the recorded SHA-256."""
    try:
        record = json.loads((folder / "testbed.json").read_text(encoding="utf-8"))
        if record["recipe"] != key or any(_sha256(folder / name) != value for name, value in record["files"].items()):
            return None
        if wanted and record["fingerprint"] != wanted:
            return None
        unaligned, aligned = (folder / stage for stage in STAGES)
        made = (record["gate"], record["fingerprint"], record["origin"], float(record["seconds"]))
        return Testbed(folder, unaligned, aligned, *made)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, models: Mapping[str, LlamaForCausalLM], tokenizer, record: Mapping[str, Any]) -> None:
    """Save under a temporary name, then rename: a half-written testbed is never seen."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for stage, model in models.items():
            with without_bar():
                model.save_pretrained(temporary / stage)
            tokenizer.save_pretrained(temporary / stage)
        files = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        record = dict(record) | {"files": {name: _sha256(temporary / name) for name in files}}
        (temporary / "testbed.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train(folder: Path, recipe: Recipe, key: str, seed: int, progress: bool) -> None:
    start = time.perf_counter()
    tokenizer = make_tokenizer(recipe)
    models = dict(zip(STAGES, train(recipe, tokenizer, seed, progress), strict=True))
    unmeasured: dict[str, Any] = {"measured": False, "passed": None, "missed": [], "dev": [], "test": []}
    record = {
        "recipe": key,
        "origin": "trained",
        "fingerprint": fingerprint(models),
        "gate": _gate(models, tokenizer) if recipe.gate else unmeasured,
        "seconds": round(time.perf_counter() - start, 1),
    }
    _write(folder, models, tokenizer, record)


def _gate(models: Mapping[str, LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> dict:
    return measure_gate(*(LanguageModel(models[stage].eval(), tokenizer, f"testbed-{stage}") for stage in STAGES))


def fingerprint(models: Mapping[str, LlamaForCausalLM]) -> str:
    """16 hex digits of the weights of both stages."""
    named = [(f"{stage}.{n}", w) for stage, model in models.items() for n, w in model.named_parameters()]
    return digest_of(named)[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def without_bar() -> Iterator[None]:
    """Without the library's own progress bars, which small files do not need."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------ shipped weights
#
# weights/seed-N.safetensors holds, in float16, the unaligned model's weights and of the aligned ones those entries that
# differ: `NAME.where` has one bit an entry and `NAME.values` the aligned value of each one that is set.


@functools.cache
def shipped() -> dict[str, Any]:
    """The index of the shipped weights: seeds -> sha256, recipe, fingerprint, gate (of these weights) and seconds."""
    index = WEIGHTS / "index.json"
    try:
        return json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"files": {}, "seeds": {}}
    except (OSError, ValueError) as error:
        raise InputError(f"testbed: {index} cannot be read ({error}); install the package again") from error


def _refuse(seed: int, why: str) -> InputError:
    retrain = f"python -m nt_utils.testbed train --seed {seed}"
    return InputError(f"testbed: the shipped weights of seed {seed} {why}; install the package again, or run {retrain}")


def _checked(seed: int, key: str) -> dict[str, Any]:
    """The index entry of a seed whose files are whole and whose recipe is today's."""
    record, file = shipped()["seeds"][str(seed)], WEIGHTS / f"seed-{seed}.safetensors"
    if record["recipe"] != key:
        raise _refuse(seed, "were trained with another version of the recipe or the corpus")
    wanted = {file.name: record["sha256"]} | shipped()["files"]
    try:
        damaged = [name for name, value in wanted.items() if _sha256(WEIGHTS / name) != value]
    except OSError:
        raise _refuse(seed, "are missing") from None
    if damaged:
        raise _refuse(seed, f"are damaged ({damaged[0]})")
    return record


def _unpack(seed: int, record: Mapping[str, Any]) -> dict[str, LlamaForCausalLM]:
    """The shipped models of a seed, float32."""
    stored = load_file(WEIGHTS / f"seed-{seed}.safetensors")
    base = {name.removeprefix("base."): w.float() for name, w in stored.items() if name.startswith("base.")}
    models = {}
    for stage, state in (("unaligned", base), ("aligned", _apply(stored, base))):
        models[stage] = new_model(RECIPES["default"], _tokenizer(), seed).eval()
        models[stage].load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    if fingerprint(models) != record["fingerprint"]:
        raise _refuse(seed, "do not have the fingerprint of the index")
    return models


def _apply(stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The aligned weights, from the unaligned ones and the stored differences."""
    state = dict(base)
    for name in (n.removesuffix(".where") for n in stored if n.endswith(".where")):
        old = base[name]
        bits = np.unpackbits(stored[f"{name}.where"].numpy(), count=old.numel())
        state[name] = old.masked_scatter(
            torch.from_numpy(bits).bool().reshape(old.shape), stored[f"{name}.values"].float()
        )
    return state


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(WEIGHTS / "tokenizer")


def ship(seed: int, models: Mapping[str, LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, seconds: float) -> dict:
    """Write a trained testbed of the default size into the package, measure its gate, and enter it into the index."""
    WEIGHTS.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    aligned = dict(models["aligned"].named_parameters())
    for name, weight in models["unaligned"].named_parameters():
        old, new = weight.detach().half(), aligned[name].detach().half()
        tensors[f"base.{name}"] = old.contiguous()
        if (old != new).any():
            tensors[f"{name}.where"] = torch.from_numpy(np.packbits((old != new).numpy()))
            tensors[f"{name}.values"] = new[old != new]
    file = WEIGHTS / f"seed-{seed}.safetensors"
    save_file(tensors, file)
    tokenizer.save_pretrained(WEIGHTS / "tokenizer")
    index = dict(shipped())
    index["files"] = {f"tokenizer/{p.name}": _sha256(p) for p in sorted((WEIGHTS / "tokenizer").iterdir())}
    record = {
        "sha256": _sha256(file),
        "recipe": recipe_hash(RECIPES["default"], seed),
        "fingerprint": fingerprint(models),
        "seconds": round(seconds, 1),
        "gate": _gate(models, tokenizer),
    }
    seeds = index["seeds"] | {str(seed): record}
    index["seeds"] = {number: seeds[number] for number in sorted(seeds, key=int)}
    (WEIGHTS / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    shipped.cache_clear()
    return record
