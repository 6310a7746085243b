"""Loading a causal language model from a local folder or the hub."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nt_utils.errors import InputError, ModelError, first_line, gate_message
from nt_utils.models.families import check_family
from nt_utils.models.language import LanguageModel


def check_source(source, revision: str | None = None):
    """Read the config only: does the model exist, is it reachable, is its family supported?

    Returns the config. Raises ModelError in one line, before any weight is touched.
    """
    from transformers import AutoConfig

    source = _expanded(source)
    path = Path(source)
    is_folder = path.is_dir()
    if is_folder and not (path / "config.json").is_file():
        raise ModelError(f"model: the folder {source} holds no config.json")
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if not is_folder and looks_local:
        raise ModelError(f"model: no folder {source}")
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "gated repo" in str(error):
            raise ModelError(f"model: {gate_message(str(source))}") from error
        where = (
            "its config.json cannot be read"
            if is_folder
            else "not found on the hub, or the hub is unreachable and it is not cached"
        )
        raise ModelError(f"model: {source}: {where} ({first_line(error)})") from error
    check_family(config)
    return config


def _expanded(source) -> str:
    return str(Path(source).expanduser()) if str(source).startswith("~") else str(source)


def load(
    source,
    *,
    dtype: str | torch.dtype = "auto",
    device_map="auto",
    system_prompt: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer from a local folder or the hub.

    Args:
        source: folder or hub id.
        dtype: "auto" keeps the checkpoint's on an accelerator; on the CPU half precision becomes float32 where the
            memory allows it (several times faster there). Or a torch dtype or its name.
        device_map: as in transformers; "auto" uses accelerators if there are any.
        system_prompt: stands before every prompt.

    Raises:
        ModelError: see :func:`check_source`; or no tokenizer is there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _expanded(source)
    config = check_source(source, revision)
    if device_map == "auto" and not torch.cuda.is_available():
        device_map = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            str(source),
            revision=revision,
            dtype=_choose_dtype(dtype, config, device_map),
            device_map=device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model: {source} could not be loaded: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return LanguageModel(model.eval(), tokenizer, str(source), system_prompt)


def _choose_dtype(dtype, config, device_map):
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        chosen = getattr(torch, str(dtype), None)
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point or chosen.itemsize < 2:
            raise InputError(f"dtype: got {dtype!r}; allowed: auto, float32, bfloat16, float16")
        return chosen
    stored = getattr(config, "dtype", None)
    if device_map is None and stored in (torch.float16, torch.bfloat16) and _fits_in_float32(config):
        return torch.float32
    return stored or "auto"


def _fits_in_float32(config) -> bool:
    """Whether a float32 copy takes less than half of the machine's memory (parameters estimated from the config)."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    estimate = layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * config.vocab_size * hidden
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return False
    return 4 * estimate < memory / 2
