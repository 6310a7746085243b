"""GGUF files as a source of models: dequantised once into an ordinary checkpoint in the cache.

The checkpoint holds the dequantised weights, the tokenizer and the chat template, and `source.json`, which says what
file it was made from. Models of up to ``FLOAT32_PARAMETERS`` parameters are kept in float32, which loses nothing.
Larger ones are kept in bfloat16, the precision they were published and are run in; each weight is then rounded by at
most 2**-8 of itself, and `source.json` says so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from nt_utils.data.sources import hub_reachable
from nt_utils.errors import ModelError, first_line
from nt_utils.files import cache_folder, writable
from nt_utils.models.families import check_family
from nt_utils.work import memory

FLOAT32_PARAMETERS = 1_000_000_000
RECORD = "source.json"
FORM = 1  # of the checkpoint: to be raised with every change of what is written, so that older ones are made again
#: Byte-level vocabularies whose rule for splitting text transformers cannot read from a GGUF file; None = GPT-2's rule.
_DIGITS_APART = ("smollm", "refact", "starcoder", "command-r")
_GPT2_SPLIT = ("default", "gpt-2", "gpt2", None)


def file(source: str, revision: str | None = None) -> Path:
    """The local file of "path/file.gguf" or "org/name:folder/file.gguf" (a file of a hub repository)."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    repository, colon, name = source.partition(":")
    if not colon or repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise ModelError(f"model: no file {source}; a file of the hub is written org/name:file.gguf")
    from huggingface_hub import hf_hub_download

    try:
        offline = not hub_reachable()
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=offline))
    except Exception as error:  # whatever the hub client raises
        raise ModelError(f"model: {source} cannot be had from the hub ({first_line(error)})") from error


def folder(path: Path) -> Path:
    """The checkpoint of a local GGUF file, made where the cache does not have it yet.

    Raises:
        ModelError: `path` is damaged, of a family or quantisation that is not supported, or disk or memory are short.
    """
    try:
        stat = path.stat()
        digest = sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"model: {path} cannot be read ({error.strerror or error})") from error
    return cached(digest) or _made(path, digest)


@functools.cache
def sha256(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file; read again only when its size or time of change (nanoseconds) are others."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cached(digest: str) -> Path | None:
    """The checkpoint made from the file of this SHA-256, if the cache has it complete and in today's form."""
    home = cache_folder() / "models" / digest
    try:
        record = json.loads((home / RECORD).read_text(encoding="utf-8"))
        whole = record.get("form", 1) == FORM and all(
            (home / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return home if whole else None


def origin(checkpoint: str | Path) -> dict[str, Any]:
    """The file that a checkpoint folder was made from, its SHA-256, and what its weights were rounded to; {} for others."""
    note = Path(checkpoint) / RECORD
    if not note.is_file():
        return {}
    return {key: value for key, value in json.loads(note.read_text(encoding="utf-8")).items() if key != "files"}


def _made(path: Path, digest: str) -> Path:
    home = cache_folder() / "models" / digest
    writable(home.parent)
    with FileLock(f"{home}.lock"):
        found = cached(digest)
        if found:
            return found
        made = home.with_name(f".{digest}.tmp")
        for leftover in (home, made):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            _convert(path, digest, made)
            made.rename(home)
        except OSError as error:
            raise ModelError(f"model: {path} cannot be unpacked below {home.parent} ({first_line(error)})") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return home


def _convert(path: Path, digest: str, target: Path) -> None:
    """Write the checkpoint of a GGUF file to a new folder."""
    header = _header(path)
    parameters = header["parameters"]
    dtype = torch.float32 if parameters <= FLOAT32_PARAMETERS else torch.bfloat16
    check_room(target.parent, dtype.itemsize * parameters, str(path))
    tokenizer = _tokenizer(path, header["split"])
    model = _model(path, dtype)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _say_what_is_missing(target / "tokenizer_config.json")
    record = {
        "form": FORM,
        "file": path.name,
        "sha256": digest,
        "tensors": header["tensors"],
        "dtype": str(dtype).removeprefix("torch."),
        "largest relative rounding": 0.0 if dtype == torch.float32 else 2.0**-8,
        "files": {p.name: p.stat().st_size for p in sorted(target.iterdir())},
    }
    (target / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def check_room(home: Path, needed: int, what: str) -> None:
    """Refuse what takes `needed` bytes of memory, and as many on the disk of folder `home`, where they are not free."""
    writable(home)
    for name, free, advice in (
        ("disk", shutil.disk_usage(home).free, f"below {home}; NT_CACHE names another folder"),
        ("memory", memory()[1], "of memory; close other programs or take a smaller model"),
    ):
        if needed > free:
            raise ModelError(
                f"model: {what} needs {needed / 1e9:.1f} GB of {name}; {free / 1e9:.1f} GB are free {advice}"
            )


def _header(path: Path) -> dict[str, Any]:
    """What the file says it holds: number of parameters, tensors by precision, and how its tokenizer splits text."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        names = {name: reader.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre")}
        rules = {name: field.contents() for name, field in names.items() if field}
    except Exception as error:  # a damaged file fails anywhere in the parser
        raise ModelError(f"model: {path} is damaged or no GGUF file ({first_line(error)})") from error
    for tensor in reader.tensors:
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except Exception as error:  # a type that the library only knows by name, or data that is no such type
            raise ModelError(
                f"model: {path} holds weights in {tensor.tensor_type.name} ({tensor.name}), which cannot be dequantised"
                f" ({first_line(error)})"
            ) from error
    split = rules.get("pre") if rules.get("model") == "gpt2" else ""
    return {
        "parameters": sum(math.prod(int(n) for n in tensor.shape) for tensor in reader.tensors),
        "tensors": dict(kinds),
        "split": split,
    }


def _tokenizer(path: Path, split: str | None):
    """The file's tokenizer, with the rule by which its vocabulary splits text, and no token that the file lacks."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = (*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS_APART, *_GPT2_SPLIT, "")
    if split not in known:
        raise ModelError(f"model: {path}: its tokenizer splits text by the rule {split!r}, which is not known here")
    try:
        found: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # a foreign file fails anywhere in the parser
        raise ModelError(f"model: {path}: its tokenizer cannot be read ({first_line(error)})") from error
    # transformers adds the unknown token of GPT-2's tokenizer, behind the embedding's last row.
    rules = json.loads(found.backend_tokenizer.to_str())
    vocabulary = rules["model"]["vocab"]
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["id"] < len(vocabulary)]
    core = Tokenizer.from_str(json.dumps(rules))
    if split in _DIGITS_APART:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    named = {name: getattr(found, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    named = {name: token for name, token in named.items() if core.token_to_id(str(token)) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=found.chat_template, **named)


def _say_what_is_missing(config: Path) -> None:
    """Write null for special tokens that a tokenizer lacks: some classes add their own where nothing is said."""
    rules = json.loads(config.read_text(encoding="utf-8"))
    rules = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token")) | rules
    config.write_text(json.dumps(rules, indent=1, ensure_ascii=False), encoding="utf-8")


def _model(path: Path, dtype: torch.dtype):
    """The file's model, dequantised; every weight must have come from the file and be finite."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**source)
        config.quantization_config = None
        check_family(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, output_loading_info=True)
    except ModelError as error:
        raise ModelError(f"{error} (in {path})") from error
    except Exception as error:  # a foreign file fails anywhere in the parser
        raise ModelError(f"model: {path} cannot be dequantised ({first_line(error)})") from error
    model, report = loaded
    missing = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if missing:
        raise ModelError(f"model: {path} lacks {len(missing)} weights, the first {', '.join(missing[:3])}")
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise ModelError(f"model: {path} holds weights that are no finite numbers, the first in {bad[0]}")
    # Without these save_pretrained takes the model for a quantised one and refuses.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config.name_or_path = ""
    return model
