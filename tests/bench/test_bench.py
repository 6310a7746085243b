"""The benchmarks measure what they say (no times are asserted here)."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from nt_utils import hooks
from nt_utils.bench import __main__ as bench_main
from nt_utils.bench import evaluation, memory, parts, rivals, tuning
from nt_utils.bench import growth as bench_growth
from nt_utils.bench.__main__ import BARS, long_prompt, main, precision, table
from nt_utils.bench.errors import error_table
from nt_utils.bench.growth import BASE, operations
from nt_utils.bench.setup import SHAPES, RandomPrompts, Shape, byte_tokenizer, random_model, seconds
from nt_utils.evaluation import batching
from nt_utils.models import DecoderView, LanguageModel, pad
from nt_utils.scoring.importance import importance, score_batch
from tests.tiny import hooks_left, tiny_model

SMALL = replace(SHAPES["a"], layers=2, hidden=64, heads=4, ffn=64, batch=1, tokens=8)


@pytest.fixture(scope="module")
def view():
    return DecoderView(tiny_model("llama"))


@pytest.fixture(scope="module")
def batch():
    rows = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return pad(rows, pad_id=0, side="right", prompt_lengths=[9, 9])


def test_the_published_way_is_restated(view, batch):
    """One masked query channel: the change of all heads' softmax without mask and rotary embedding."""
    scores = rivals.peer_scores(view, batch)
    assert len(scores[1, "q"]) == 2
    assert len(scores[1, "q"][0]) == view.space.width((1, "q"))
    with torch.no_grad(), hooks.capture(view, [(1, "q"), (1, "k")]) as seen:
        view.model(batch.input_ids[1:], use_cache=False)
    query, key = seen[1, "q"][0], seen[1, "k"][0]
    head, channel = 2, 5  # key/value head 1 serves query heads 2 and 3
    q, k = query[:, 16:24], key[:, 8:16]
    without = q.clone()
    without[:, channel] = 0
    change = (without @ k.T / math.sqrt(8)).softmax(-1) - (q @ k.T / math.sqrt(8)).softmax(-1)
    assert scores[1, "q"][1][head * 8 + channel] == pytest.approx(change.norm().item(), rel=1e-4)


def test_the_linearised_scores_are_the_first_order(batch):
    """For small logits the linearised scores are the exact ones; for large ones they are not."""
    for size, same in ((1e-3, True), (2.0, False)):
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight *= size
        view = DecoderView(model)
        exact = score_batch(view, batch, kinds=("q", "k"))
        with rivals.linearised():
            linear = score_batch(view, batch, kinds=("q", "k"))
        close = all(torch.allclose(exact[s], linear[s], rtol=2e-2) for s in exact)
        assert close == same


def test_the_gpu_script_runs(monkeypatch):
    """At a tiny shape on the CPU: its table's error against brute force is within bf16's tolerance."""
    from nt_utils.bench import gpu

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    monkeypatch.setattr(gpu, "CONFIGS", {"tiny": lambda layers: config})
    monkeypatch.setattr(gpu, "VOCABULARY", 256)
    monkeypatch.setattr(gpu, "PROMPTS", 8)
    (row,) = gpu.gpu_table(device="cpu")
    assert 0 < row["brute_error"] < row["tolerance"]
    assert row["exact_over_forward"] > 1 and row["tokens_per_second"] > 0


def test_the_linearised_mode_ends_with_its_context(view, batch):
    before = score_batch(view, batch)
    with rivals.linearised():
        pass
    after = score_batch(view, batch)
    assert all(torch.equal(before[site], after[site]) for site in before)


def test_zeroed_forwards_leave_no_hooks(view, batch):
    for run in rivals.zeroed_forwards(view, batch, count=3):
        run()
    assert hooks_left(view.model) == 0


def test_expected_operations_follow_the_shape():
    base, longer = operations(BASE), operations(replace(BASE, tokens=128))
    twice = operations(replace(BASE, layers=2 * BASE.layers))
    assert twice["entries"] == 2 * base["entries"]
    assert twice["forward"] == pytest.approx(2 * base["forward"])
    assert 3 < longer["entries"] / base["entries"] < 4.1  # quadratic in the prompt's length


def test_growth_is_of_exact_scores_at_every_length(monkeypatch):
    """Formerly the longest prompts had estimated query and key scores, beside operations of exact ones."""
    shape, found = Shape(32, 2, 4, 2, 64, 1, 8), []
    monkeypatch.setattr(bench_growth, "score_batch", lambda *a, **more: found.append(more["exact_tokens"]))
    bench_growth._point("tokens", shape, 1)
    assert found and set(found) == {None}


def test_a_part_measured_later_keeps_the_others_record(tmp_path, monkeypatch, capsys):
    for part in ("agreement", "memory"):
        monkeypatch.setitem(bench_main.PARTS, part, lambda options, part=part: {part: options.threads})
    assert [
        main(["--only", p, "--threads", t, "--out", str(tmp_path)]) for p, t in (("memory", "1"), ("agreement", "2"))
    ]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {part: record["threads"] for part, record in found["machines"].items()} == {"memory": 1, "agreement": 2}


def test_random_prompts_can_be_scored():
    lm = RandomPrompts(tiny_model("llama"), None, "random")
    lm.tokens_a_prompt = 7
    scores = importance(lm, ["0", "1", "2"], batch_size=2, progress=False)
    assert scores.n_prompts == 3
    assert not torch.equal(scores.get(0, "ffn")[0], scores.get(0, "ffn")[1])


def test_every_function_is_timed_in_every_round():
    calls = []
    times = seconds({"x": lambda: calls.append("x"), "y": lambda: calls.append("y")}, 3)
    assert calls == ["x", "y"] * 4  # a warm-up round, then three
    assert [len(t) for t in times.values()] == [3, 3]


def test_the_table_shows_missing_values():
    text = table({"exact_over_forward": {"a": 3.5}})
    assert "exact_over_forward.a" in text
    assert "3.50" in text
    assert text.count(" -  ") >= 5


def test_the_published_way_of_masking_trains_the_same_neurons():
    """One step of the dense baseline moves what the sparse one moves, and costs more memory in its state."""
    moved = {}
    for what in ("sparse", "dense", "full"):
        lm = RandomPrompts(tiny_model("llama"), None, "random")
        before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
        batch = pad([list(range(8))], pad_id=0, side="right", prompt_lengths=[8])
        step, training = tuning.stepper(what, lm, batch, 0.1)
        step()
        if training is not None:
            training.merge()
        after = dict(lm.model.named_parameters())
        moved[what] = {n: after[n] != p for n, p in before.items()}
    assert all(torch.equal(moved["sparse"][n], moved["dense"][n]) for n in moved["dense"])
    share = sum(int(m.sum()) for m in moved["sparse"].values()) / sum(m.numel() for m in moved["full"].values())
    assert 0 < share < 0.1 < sum(int(m.sum()) for m in moved["full"].values()) / 1e4
    found = tuning.sizes(RandomPrompts(tiny_model("llama"), None, "random"))
    assert found["delta"] > found["share"] > 0


def test_rows_of_a_model_are_ratios_and_every_model_has_them(tmp_path, capsys):
    """Evaluation against generate, a common prefix, and a kept trunk: on the random model, and on one from a folder."""
    small = LanguageModel(random_model(SMALL), byte_tokenizer(), "random")
    found = evaluation.over_generate(small, 1, prompts=3, new_tokens=2)
    found |= evaluation.shared_prefix(small, 1, prompts=3, new_tokens=2)
    found |= tuning.frozen_trunk(small, 1, steps=2, pairs=4, batch_size=2)
    assert set(found) <= set(BARS) and len(found) == 3 and min(found.values()) > 0
    assert {layer for layer, _ in tuning.late_neurons(small.view.space, 0.5).masks} == {1}
    assert main(["--model", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert main(["--model", "x", "--only", "speed", "--out", str(tmp_path)]) == 1
    assert "model: got 'x' with --only speed" in capsys.readouterr().err


def test_a_common_prefix_is_read_once(monkeypatch):
    """The row compares what it says: the rows behind the prefix are short where it is shared, and long where it is not."""
    small, read = LanguageModel(random_model(SMALL), byte_tokenizer(), "random"), []
    padded = batching.left_padded

    def counted(*arguments):
        ids, mask = padded(*arguments)
        read.append(ids.shape[1])
        return ids, mask

    monkeypatch.setattr(batching, "left_padded", counted)
    evaluation.shared_prefix(small, 1, prompts=3, new_tokens=1)
    assert max(read) - min(read) >= evaluation.SYSTEM_TOKENS


def test_peaks_are_measured_in_a_process_of_its_own(monkeypatch):
    """It was started by a name that the module no longer has."""
    monkeypatch.setattr(memory.subprocess, "run", lambda command, **_: SimpleNamespace(stdout=f"{command[2]}\n"))
    assert find_spec(memory.fresh("nt_utils.bench.memory", "forward", "a", 8))
    monkeypatch.setattr(memory.subprocess, "run", lambda command, **_: SimpleNamespace(stdout=f"{len(command)}\n"))
    assert memory.measure("forward", "a", 8) == 6


def test_the_error_table_compares_with_the_definition():
    (row,) = error_table(("qwen2",), tokens=6).to_dict("records")
    assert all(0 < row[kind] < 1e-4 for kind in ("q", "k", "v", "o", "ffn"))


def test_rows_of_precision_and_of_long_prompts_are_ratios(monkeypatch):
    found = precision(1, SMALL, new_tokens=2)["bfloat16_over_float32"]
    assert set(found) == {"forward", "generation", "scoring"} and min(found.values()) > 0
    times, ran = {"forward": [0.5], "scores": [1.5]}, []
    monkeypatch.setattr(
        "nt_utils.bench.__main__.seconds", lambda given, n: ran.extend(f() for f in given.values()) or times
    )
    assert long_prompt(1, tokens=16)["long_over_forward"] == 3.0 and len(ran) == 2  # both ran, on a clock of our own


def test_parts_of_the_scores_cost_what_their_products_multiply():
    """Feed-forward and attention outputs need no product beside the forward pass's, queries and keys do."""
    table = parts.parts_table({"tiny": Shape(32, 1, 4, 2, 48, 2, 8)}, repeats=1).set_index("part")
    assert list(table.index) == list(parts.PARTS) and (table["time"] > 0).all()
    needed = table["multiplications"]
    assert (
        needed["ffn"] == needed["o"] == 1.0 and 1.0 < needed["q"] < needed["all"] and 1.0 < needed["k"] < needed["all"]
    )
