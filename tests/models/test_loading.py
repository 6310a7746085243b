"""What is loaded came from the checkpoint, fits the tokenizer and the memory, or is refused in one line."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForSequenceClassification, MixtralConfig

from nt_utils import models
from nt_utils.errors import InputError, ModelError
from nt_utils.models import DecoderView, precision
from tests import common
from tests.tiny import CONFIGS, tiny_lm, tiny_model, tiny_tokenizer


def saved(path, name="llama", tokenizer=True, **options):
    lm = tiny_lm(name)
    lm.model.save_pretrained(path, **options)
    if tokenizer:
        lm.tokenizer.save_pretrained(path)
    return path


def renamed(path, rename):
    """The folder with its weights under other names; None drops one."""
    file = path / "model.safetensors"
    weights = {rename(name): value for name, value in load_file(file).items()}
    weights.pop(None, None)
    save_file(weights, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), "qwen2")


def refused(path, words, **options):
    common.refused(words, lambda: models.load(path, **options), kind=ModelError)


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_of_every_family_loads_bit_for_bit(name, tmp_path):
    lm, true = models.load(saved(tmp_path, name)), tiny_model(name)
    assert lm.name == str(tmp_path) and lm.label == tmp_path.name and not lm.model.training
    assert all(torch.equal(p, q) for p, q in zip(lm.model.parameters(), true.parameters(), strict=True))
    assert models.load(tmp_path).weights_fingerprint == lm.weights_fingerprint


@pytest.mark.parametrize(
    ("name", "rename", "words"),
    [
        ("llama", lambda n: "_orig_mod." + n, r"21 weights are missing.*lm_head\.weight.* and 18 more"),
        ("llama", lambda n: n.replace("lm_head", "lm_head.0"), r"1 weights are missing.*: lm_head\.weight$"),
        ("llama", lambda n: None if "layers.1.mlp.up" in n else n, r"1 weights are missing.*layers\.1\.mlp\.up_proj"),
        ("phi3", lambda n: None if n == "lm_head.weight" else n, r"missing.*lm_head\.weight"),
        ("llama-multi-head-tied", lambda n: n.replace("norm.weight", "norm.scale"), r"5 weights are missing"),
    ],
)
def test_weights_that_the_checkpoint_lacks_are_counted_and_named(name, rename, words, tmp_path):
    refused(renamed(saved(tmp_path, name), rename), words)


@pytest.mark.parametrize("name", ["llama", "llama-multi-head-tied"])
def test_a_reward_model_is_no_language_model(name, tmp_path):
    config = CONFIGS[name]()
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, r"lm_head\.weight|score\.weight")


def test_a_weight_too_many_is_refused_and_a_tied_head_is_not_missing(tmp_path):
    path = saved(tmp_path, "llama-multi-head-tied")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    assert models.load(path).model.lm_head.weight is not None
    weights = load_file(path / "model.safetensors") | {"model.layers.0.mlp.extra.weight": torch.ones(2)}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, r"1 weights of the checkpoint have no place.*mlp\.extra")


def test_a_weight_of_another_shape_is_named_with_both_shapes(tmp_path):
    path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 290}))
    refused(path, r"\(300, 32\), the config asks for \(290, 32\)")


def test_a_cut_file_and_a_lost_shard_are_named(tmp_path):
    path = saved(tmp_path / "cut")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(path, r"model\.safetensors is cut or damaged")
    path = saved(tmp_path / "shards", max_shard_size="40KB")
    lost = sorted(path.glob("model-*.safetensors"))[1]
    lost.unlink()
    refused(path, lost.name)


# ----------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", ["gemma2", "qwen2", "llama", "gpt2", "phi3"])
def test_a_folder_without_tokenizer_files_is_refused(name, tmp_path):
    refused(saved(tmp_path, name, tokenizer=False), "tokenizer")


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(tmp_path):
    path = saved(tmp_path)
    tokenizer = tiny_tokenizer().__class__.from_pretrained(path)
    tokenizer.add_tokens([f"<new {i}>" for i in range(60)])
    tokenizer.save_pretrained(path)
    refused(path, rf"largest id is {len(tokenizer) - 1}; the embedding has 300 rows")


def test_a_tokenizer_that_lacks_the_models_own_end_token_is_another_models(tmp_path):
    path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": 299}))
    refused(path, "eos_token_id 299 is no token of the tokenizer")


# ------------------------------------------------------------------------------------------------------- sources


def test_bad_sources_get_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "cannot be read")
    MixtralConfig().save_pretrained(tmp_path)
    refused(tmp_path, "mixture-of-experts")


def test_an_unreachable_hub_model_gets_one_line(monkeypatch):
    def offline(*_args, **_more):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    message = "hub is unreachable and it is not cached"
    common.refused(message, lambda: models.check_source("someone/some-model"), kind=ModelError)


# ----------------------------------------------------------------------------------------------------- precision


def test_dtypes_and_attention_are_those_asked_for(folder):
    assert torch.equal(models.load(folder).view.weight(1, "ffn"), DecoderView(tiny_model("qwen2")).weight(1, "ffn"))
    assert models.load(folder, dtype="bfloat16", device_map=None).model.dtype == torch.bfloat16
    assert models.load(folder, attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(InputError, match="dtype: got 'float7'"):
        models.load(folder, dtype="float7")


def test_small_half_precision_checkpoints_become_float32_on_the_cpu(tmp_path):
    lm = tiny_lm("llama")
    lm.model.to(torch.bfloat16).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert models.load(tmp_path, device_map="cpu").model.dtype == torch.float32
    assert models.load(tmp_path, dtype=torch.bfloat16, device_map="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_auto_takes_the_precision_that_was_measured_to_be_faster(name, faster, monkeypatch, tmp_path):
    monkeypatch.setenv("NT_CACHE", str(tmp_path))
    config = CONFIGS[name]()
    config.dtype = torch.bfloat16
    assert precision._seconds(config, torch.bfloat16) > 0, "every family can be timed"
    monkeypatch.setattr(precision, "TIMED_FROM", 1)
    monkeypatch.setattr(precision, "_seconds", lambda config, dtype: 1.0 if dtype == faster else 2.0)
    chosen, reason = precision.choose_dtype("auto", config, on_cpu=True)
    assert chosen == faster and "float32" in reason and "bfloat16" in reason
    assert precision.choose_dtype("float32", config, on_cpu=True)[0] == torch.float32, "pinned is pinned"
    monkeypatch.setattr(precision, "_seconds", lambda config, dtype: 2.0 if dtype == faster else 1.0)
    assert precision.choose_dtype("auto", config, on_cpu=True)[0] == faster, "notebooks of a study agree"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_measurement_is_of_one_shape(name, monkeypatch, tmp_path):
    """Formerly all sizes of GPT-2, whose config has names of its own, took what was measured of the first."""
    monkeypatch.setenv("NT_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(precision, "_seconds", lambda config, dtype: float(len(asked.append(dtype) or asked)))
    for expected in (2, 4, 4):
        config = CONFIGS[name]()
        if expected == 4:
            config.hidden_size *= 2
        precision._measured(config)
        assert len(asked) == expected


def test_of_notebooks_side_by_side_one_measures_and_the_others_take_what_it_wrote(monkeypatch, tmp_path):
    monkeypatch.setenv("NT_CACHE", str(tmp_path))
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def seconds(config, dtype):
        """The first notebook finds float32 faster, any other bfloat16."""
        asked.append(threading.get_ident())
        begun.set()
        go_on.wait(60)
        return float((dtype == torch.bfloat16) == (asked[-1] == asked[0]))

    monkeypatch.setattr(precision, "_seconds", seconds)
    config = CONFIGS["llama"]()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(precision._measured, config)
        assert begun.wait(60)
        second = pool.submit(precision._measured, config)
        wait([second], timeout=0.5)
        go_on.set()
        assert first.result() == second.result() == precision._measured(config)
    assert len(asked) == 2 and len(set(asked)) == 1, "one measurement of each precision, by the first"


def test_a_cache_that_cannot_be_written_costs_the_measurement_alone(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(precision, "_seconds", lambda config, dtype: 1.0)
    assert precision._measured(CONFIGS["llama"]()) == {"float32": 1.0, "bfloat16": 1.0}


def test_too_little_memory_is_said_with_the_numbers_before_loading(folder, monkeypatch):
    monkeypatch.setattr(precision, "memory", lambda: (2**30, 1000))
    refused(folder, r"take 0\.0 GiB in float32; of 1\.0 GiB of memory 0\.0 are free", device_map="cpu")
