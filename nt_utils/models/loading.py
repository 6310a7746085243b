"""Loading a causal language model: everything that is computed with came from the checkpoint, or nothing is loaded."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from nt_utils.errors import InputError, ModelError, first_line, gate_message
from nt_utils.models.families import check_family
from nt_utils.models.identity import weights_fingerprint
from nt_utils.models.language import LanguageModel
from nt_utils.models.locate import located
from nt_utils.models.precision import choose_dtype
from nt_utils.models.prompting import DATE, Prompter, find_template

# -------------------------------------------------------------------------------------------------- before loading


def check_source(source, revision: str | None = None):
    """Read the config only: does the model exist, is it reachable, is its family supported?

    A folder or hub repository that holds only an adapter (PEFT) stands for its base model with the adapter merged.

    Returns the config. Raises ModelError in one line, before any weight is touched.
    """
    source = located(source, revision)
    path = Path(source)
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if not path.is_dir() and looks_local:
        raise ModelError(f"model: no folder {source}")
    base = _base_of_adapter(source, revision)
    if base:
        try:
            return check_source(base)
        except ModelError as error:
            raise ModelError(f"{error}; it is the base model of the adapter {source}") from error
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model: the folder {source} holds no config.json")
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "gated repo" in str(error):
            raise ModelError(f"model: {gate_message(source)}") from error
        where = (
            "its config.json cannot be read"
            if path.is_dir()
            else "not found on the hub, or the hub is unreachable and it is not cached"
        )
        raise ModelError(f"model: {source}: {where} ({first_line(error)})") from error
    check_family(config)
    return config


def _base_of_adapter(source: str, revision: str | None) -> str | None:
    """The base model that an adapter's config names; None where there is no adapter."""
    try:
        found = find_adapter_config_file(source, revision=revision)
    except (OSError, ValueError):  # no such repository, or no way to it: the config's reading says so
        return None
    if found is None:
        return None
    if (Path(source) / "config.json").is_file():
        raise ModelError(f"model: {source} holds a model and an adapter (adapter_config.json); merge or part them")
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(source, revision=revision)
    if not config.base_model_name_or_path or config.is_prompt_learning:
        raise ModelError(
            f"model: {source} holds only an adapter ({config.peft_type}), which names no base model or does not change its "
            "weights; merge it first"
        )
    return config.base_model_name_or_path


def parse_arguments(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Template arguments written as "name=value, name=value"; values are Python literals, else text.

    Raises InputError on anything without a name and a value.
    """
    if not isinstance(text, str):
        return dict(text or {})
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = map(str.strip, part.partition("="))
        if not name.isidentifier() or not equals:
            raise InputError(f"template_arguments: got {part!r}; allowed: name=value, separated by commas")
        try:
            found[name] = {"true": True, "false": False}.get(value.lower())
            found[name] = ast.literal_eval(value) if found[name] is None else found[name]
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def load_prompter(
    source,
    *,
    system_prompt: str | None = None,
    chat_template: str = "auto",
    template_arguments: str | Mapping[str, Any] | None = None,
    date: str = DATE,
    revision: str | None = None,
) -> Prompter:
    """A model's tokenizer, chat template and context without its weights: for lengths, plans and checks before loading.

    Args and errors: as for :func:`load`.
    """
    name, source = str(source), located(source, revision)
    config = check_source(source, revision)
    tokenizer, template_name = _tokenizer(source, chat_template, revision)
    options = {"template_name": template_name, "template_arguments": parse_arguments(template_arguments), "date": date}
    return Prompter(tokenizer, name, system_prompt, config=config, **options)


def _tokenizer(source: str, chat_template: str, revision: str | None):
    base = _base_of_adapter(source, revision)
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            readable = _reads(tokenizer)
        except (OSError, ValueError):
            if not base:
                raise
            readable = False
        if base and not readable:  # an adapter's folder need not have one of its own
            source = located(base)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            readable = _reads(tokenizer)
    except Exception as error:
        raise ModelError(f"model: the tokenizer of {source} could not be loaded: {first_line(error)}") from error
    if not readable:
        raise ModelError(
            f"model: {source} holds no tokenizer files (needed: tokenizer.json, or the vocabulary of its tokenizer's class)"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.chat_template, template_name = find_template(tokenizer, source, chat_template)
    return tokenizer, template_name


def _reads(tokenizer) -> bool:
    """Whether a tokenizer knows words at all: transformers makes an empty one where the files are missing."""
    ids = tokenizer("How do I bake bread?", add_special_tokens=False)["input_ids"]
    return bool(set(ids) - {tokenizer.unk_token_id})


# -------------------------------------------------------------------------------------------------------- loading


def load(
    source,
    *,
    dtype: str | torch.dtype = "auto",
    device_map="auto",
    system_prompt: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    chat_template: str = "auto",
    template_arguments: str | Mapping[str, Any] | None = None,
    date: str = DATE,
) -> LanguageModel:
    """Load a model and its tokenizer from a local folder or the hub.

    Args:
        source: folder or hub id; one that holds an adapter (PEFT) is loaded on its base model and merged.
        dtype: "auto" keeps the checkpoint's on an accelerator; on the CPU see
            :func:`~nt_utils.models.precision.choose_dtype`. Or a torch dtype or its name.
        device_map: as in transformers; "auto" uses accelerators if there are any.
        system_prompt: None or "default": the template's own; "none": no system message; or its text.
        chat_template: "auto", a name or a file (:func:`~nt_utils.models.prompting.find_template`).
        template_arguments: variables of the chat template, as a mapping or as "name=value, ...".
        date: what the chat template takes for today.

    Raises:
        ModelError: see :func:`check_source`; no tokenizer; weights that are missing, left over or of another shape; a file
            that is cut; a tokenizer that does not fit the model; too little memory.
        InputError: another argument is not allowed.
    """
    name, source = str(source), located(source, revision)
    config = check_source(source, revision)
    base = _base_of_adapter(source, revision)
    tokenizer, template_name = _tokenizer(source, chat_template, revision)
    if device_map == "auto" and not torch.cuda.is_available():
        device_map = None
    chosen, reason = choose_dtype(dtype, config, on_cpu=device_map in (None, "cpu"))
    options = {"dtype": chosen, "device_map": device_map, "attn_implementation": attn_implementation}
    model = _weights(located(base) if base else source, None if base else revision, options)
    _check_tokenizer(tokenizer, model, source)
    if base:
        model = _with_adapter(model, source, revision)
    options = {"template_name": template_name, "template_arguments": parse_arguments(template_arguments), "date": date}
    lm = LanguageModel(model.eval(), tokenizer, name, system_prompt, **options)
    lm.dtype_reason = reason
    return lm


def _weights(source: str, revision: str | None, options: Mapping[str, Any]):
    """The model, if the checkpoint holds exactly its weights."""
    loader: Any = AutoModelForCausalLM
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what does not fit is an error below
    try:
        model, info = loader.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
            **{name: value for name, value in options.items() if value is not None},
        )
    except Exception as error:  # foreign libraries raise errors of many kinds for a damaged file
        damaged = _damaged_file(source)
        why = f"{damaged} is cut or damaged" if damaged else first_line(error)
        raise ModelError(f"model: {source} could not be loaded: {why}") from error
    finally:
        logging.set_verbosity(level)
    wrong = [
        f"{name} has {tuple(found)}, the config asks for {tuple(asked)}"
        for name, found, asked in info["mismatched_keys"]
    ]
    missing = sorted(set(info["missing_keys"]) - {name for name, *_ in info["mismatched_keys"]})
    for what, names in {
        "whose shape is not the config's": sorted(wrong),
        "are missing from the checkpoint": missing,
        "of the checkpoint have no place in the model": sorted(info["unexpected_keys"]),
    }.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"model: {source}: {len(names)} weights {what}: {', '.join(names[:3])}{more}")
    if info.get("error_msgs"):
        raise ModelError(f"model: {source} could not be loaded: {str(info['error_msgs'][0]).splitlines()[0]}")
    return model


def _damaged_file(source: str) -> str | None:
    """The first weight file of a folder that cannot be opened."""
    for path in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else ():
        try:
            with safe_open(path, "pt"):
                pass
        except Exception:
            return path.name
    return None


def _check_tokenizer(tokenizer, model, source: str) -> None:
    """Whether every id that the tokenizer can write has a row in the embedding, and the model's special ids a token."""
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= rows:
        raise ModelError(f"model: {source}: the tokenizer's largest id is {largest}; the embedding has {rows} rows")
    known = set(vocabulary.values())
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(model.config, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < rows and number not in known:
                raise ModelError(
                    f"model: {source}: the config's {name} {number} is no token of the tokenizer, which is another model's"
                )


def _with_adapter(model, folder: str, revision: str | None):
    """The base model with an adapter merged into its weights."""
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    try:
        _check_base(model, folder)
        config = PeftConfig.from_pretrained(folder, revision=revision)
        config.inference_mode = True
        config.base_model_name_or_path = model.name_or_path  # where the base was found; PEFT warns of another name
        peft_model = get_peft_model(model, config)
        found: Any = set_peft_model_state_dict(peft_model, load_peft_weights(folder, device="cpu", revision=revision))
        lost = [
            name
            for name in found.missing_keys
            if any(f".{part}" in name for part in ("lora_", "ia3_", "modules_to_save"))
        ]
        left = [*found.unexpected_keys, *lost]
        if left:
            raise ModelError(f"{len(left)} of its weights do not fit the base model: {', '.join(left[:3])}")
        return peft_model.eval().merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ModelError(
            f"model: the adapter {folder} could not be merged into its base model: {first_line(error)}"
        ) from error


def _check_base(model, folder: str) -> None:
    """Raise ModelError where an adapter's header names other base weights in this precision (`export.write_lora`)."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    wanted = header.get("weights") if header.get("dtype") == str(model.dtype) else None
    if wanted and wanted != (found := weights_fingerprint(model)):
        raise ModelError(f"it was made for the weights {wanted}; these are {found}")
