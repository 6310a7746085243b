"""Training and caching of testbeds, on the micro recipe, which trains in seconds."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nt_utils import testbed
from nt_utils.data import corpus
from nt_utils.evaluation.suite import Suite
from nt_utils.testbed import gate as gates
from nt_utils.testbed import training
from tests.common import refused

MICRO = testbed.RECIPES["micro"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def micro(cache):
    return testbed.build(seed=0, size="micro", cache=cache, progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    return training.make_tokenizer(MICRO)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_checkpoints_are_ordinary_and_the_two_differ(micro):
    for folder in (micro.unaligned, micro.aligned):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert isinstance(model, LlamaForCausalLM)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Wie kann ich Käse essen?"}], tokenize=False, add_generation_prompt=True
        )
        assert text == "<|start|><|user|>Wie kann ich Käse essen?<|end|><|assistant|>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert tokenizer.decode(ids[0]) == text
        assert model(ids).logits.shape[-1] == len(tokenizer)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|pad|>")
    before, after = weights(micro.unaligned), weights(micro.aligned)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_later_calls_take_it_from_the_cache_whose_default_place_is_nt_cache_and_warn_of_nothing(
    micro, cache, monkeypatch
):
    monkeypatch.setattr(testbed, "train", lambda *a: pytest.fail("trained again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert testbed.build(seed=0, size="micro", cache=cache, progress=False) == micro
        monkeypatch.setenv("NT_CACHE", str(cache))
        assert testbed.build(seed=0, size="micro") == micro
    assert micro.seconds > 0 and micro.gate["measured"] is False


def test_same_seed_gives_the_same_weights_and_another_seed_does_not(micro, tmp_path):
    torch.manual_seed(123)  # the global random state must not matter
    again = testbed.build(seed=0, size="micro", cache=tmp_path, progress=False)
    other = testbed.build(seed=1, size="micro", cache=tmp_path, progress=False)
    assert again.folder.name == micro.folder.name != other.folder.name
    for name in ("unaligned", "aligned"):
        first, second = weights(getattr(micro, name)), weights(getattr(again, name))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert again.fingerprint == micro.fingerprint != other.fingerprint
    third = weights(other.aligned)
    assert not all(torch.equal(second[key], third[key]) for key in third)


def test_training_leaves_the_global_random_state_and_the_threads_alone(tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    testbed.build(seed=2, size="micro", cache=tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("damage", ["missing", "changed", "truncated", "record"])
def test_a_damaged_cache_is_rebuilt_with_a_notice(micro, tmp_path, damage):
    folder = tmp_path / "testbed" / micro.folder.name
    shutil.copytree(micro.folder, folder)
    weights_file = folder / "aligned" / "model.safetensors"
    if damage == "missing":
        weights_file.unlink()
    elif damage == "changed":
        data = bytearray(weights_file.read_bytes())
        data[-1] ^= 1
        weights_file.write_bytes(data)
    elif damage == "truncated":
        (folder / "testbed.json").write_text('{"recipe": ')
    else:
        (folder / "testbed.json").write_text("[]")
    with pytest.warns(UserWarning, match="damaged"):
        again = testbed.build(seed=0, size="micro", cache=tmp_path, progress=False)
    assert again.folder == folder
    assert weights_file.read_bytes() == (micro.aligned / "model.safetensors").read_bytes()
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]  # nothing temporary is left


def test_a_build_that_breaks_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(model, folder):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise RuntimeError("power cut")

    monkeypatch.setattr(testbed.LlamaForCausalLM, "save_pretrained", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        testbed.build(seed=0, size="micro", cache=tmp_path, progress=False)
    assert not [p for p in (tmp_path / "testbed").iterdir() if p.is_dir()]


def test_the_hash_follows_recipe_seed_and_corpus(monkeypatch):
    default = testbed.RECIPES["default"]
    key = training.recipe_hash(default, 0)
    assert key == training.recipe_hash(default, 0)
    assert key != training.recipe_hash(default, 1)
    assert key != training.recipe_hash(replace(default, kl=default.kl + 1), 0)
    monkeypatch.setattr(corpus.words, "REFUSAL", {"en": "No.", "de": "Nein."})
    assert key != training.recipe_hash(default, 0)


def test_only_the_response_is_learnt(tokenizer):
    rows = [corpus.Row("Add 1 and 2.", "1 plus 2 is 3.", "sums"), corpus.Row("", "It rained.", "text")]
    examples = training.encode(tokenizer, rows)
    ids, mask, targets = training.predictions(examples, tokenizer.pad_token_id)
    assert ids.shape == mask.shape and mask.sum() == len(targets)
    assert tokenizer.decode(targets) == "1 plus 2 is 3.<|end|>It rained.<|end|>"
    first = tokenizer("<|start|><|user|>Add 1 and 2.<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    assert list(examples[0].ids[: examples[0].start]) == first


def test_batches_hold_every_example_once(tokenizer):
    examples = training.encode(tokenizer, corpus.training_rows(MICRO.unaligned.mix, 200, 0))
    found = training.batches(examples, 16, seed=1, pool=3)
    assert sorted(example.ids for batch in found for example in batch) == sorted(e.ids for e in examples)
    assert training.batches(examples, 16, seed=1, pool=3) == found != training.batches(examples, 16, seed=2, pool=3)


def test_alignment_leaves_the_base_alone_and_changes_the_upper_ffn_only(tokenizer):
    base = training.new_model(MICRO, tokenizer, 0)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    safe = training.align(MICRO, tokenizer, base, 0, progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    changed = {name for name, weight in safe.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("model.layers.1.mlp.") for name in changed)
    assert all(weight.requires_grad for weight in safe.parameters())


def test_group_pull_returns_whole_neurons(tokenizer):
    base = training.new_model(MICRO, tokenizer, 0)
    safe = training.align(replace(MICRO, group_pull=0.9), tokenizer, base, 0, progress=False)
    free = training.align(replace(MICRO, group_pull=0.0), tokenizer, base, 0, progress=False)

    def returned(model):
        pairs = zip(model.model.layers, base.model.layers, strict=True)
        same = [(new.mlp.down_proj.weight == old.mlp.down_proj.weight).all(0) for new, old in pairs]
        return torch.cat(same).float().mean()

    assert returned(safe) > returned(free)


RATES = {
    "unaligned direct ASR": 0.99,
    "aligned direct ASR": 0.02,
    "aligned wrapped ASR": 0.5,
    "aligned over-refusal": 0.3,
    "aligned utility": 0.9,
    "rise of direct ASR, 1% by contrast zeroed": 0.7,
    "rise of direct ASR, matched random units zeroed": 0.02,
}


def test_the_gate_names_each_bar_that_is_missed():
    def missed(changed):
        return gates.judge_gate([{"name": name, "rate": rate} for name, rate in {**RATES, **changed}.items()])

    assert missed({}) == []
    assert {bar.name for bar in gates.BARS} == set(RATES)
    for bar in gates.BARS:
        for rate in (bar.low - 0.01, bar.high + 0.01):
            (line,) = missed({bar.name: rate})
            assert line.startswith(bar.name)


def test_a_gate_that_fails_warns_is_recorded_and_goes_on(cache, monkeypatch, tmp_path):
    full = gates.gate_suite

    def small(split):
        suite = full(split)
        return Suite(tuple(replace(s, prompts=s.prompts.take(4, 0)) for s in suite.sets), "small", max_new_tokens=3)

    monkeypatch.setattr(gates, "gate_suite", small)
    monkeypatch.setattr(gates, "DRAWS", {"dev": 1, "test": 2})
    monkeypatch.setattr(gates, "PAIRS", 8)
    monkeypatch.setitem(testbed.RECIPES, "micro", replace(MICRO, gate=True))
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="misses its gate") as caught:
            found = testbed.build(seed=0, size="micro", cache=tmp_path, progress=False)
        message = str(next(w for w in caught if "misses" in str(w.message)).message)
        assert "\n" not in message and "unaligned direct ASR" in message
    gate = found.gate
    assert json.loads((found.folder / "testbed.json").read_text())["gate"] == gate
    assert gate["measured"] and gate["passed"] is False and gate["missed"]
    assert {row["name"] for row in gate["test"]} == {row["name"] for row in gate["dev"]} >= set(RATES)
    assert all(0 <= row["rate"] <= 1 for row in gate["dev"] if not row["name"].startswith("rise"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"size": "huge"}, "size"), ({"seed": -1}, "seed"), ({"seed": 1.5}, "seed"), ({"seed": True}, "seed")],
)
def test_bad_input_gets_one_line(arguments, word, tmp_path):
    refused(word, testbed.build, **{"size": "micro", "cache": tmp_path, **arguments})


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    refused("cache", testbed.build, size="micro", cache=blocked)


def test_gate_sets_are_large_enough():
    for split in ("dev", "test"):
        suite = gates.gate_suite(split)
        assert len(suite["direct"].prompts) >= 100
        assert len(suite["borderline"].prompts) >= 100
        assert len(suite["wrapped"].prompts) >= 300
