import copy
import json
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from tokenizers import processors

from nt_utils import work
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError, ModelError
from nt_utils.evaluation import batching, generation, likelihood
from nt_utils.evaluation.generation import generate
from tests.common import ScaledLogits, refused
from tests.tiny import tiny_lm

TEXTS = [
    "how do I bake bread",
    "hello",
    "tell me a story about a ship and its captain",
    "why",
    "how do I sail",
    "12 + 5",
]


@pytest.fixture
def lm():
    return tiny_lm("llama")


def plain_greedy(lm, text, max_new_tokens, prefill=""):
    """The library's own greedy decoding of one prompt, without padding."""
    ids = lm.tokens([lm.render([text])[0]])[0] + lm.tokenizer(prefill, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        out = lm.model.generate(
            torch.tensor([ids]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=lm.pad_id,
            eos_token_id=list(lm.stop_ids),
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_batched_greedy_equals_the_librarys_one_by_one(family):
    lm = tiny_lm(family)
    # An early stop for some rows: the most frequent first token of the free run ends a response.
    free = [plain_greedy(lm, text, 12) for text in TEXTS]
    lm.model.generation_config.eos_token_id = [2, free[0][3]]
    wanted = [plain_greedy(lm, text, 12) for text in TEXTS]
    stops = set(lm.stop_ids)
    assert len({len(row) for row in wanted}) > 1, "some responses must end earlier than others"
    got = generate(lm, TEXTS, max_new_tokens=12, batch_size=4, progress=False)
    for row, response in zip(wanted, got, strict=True):
        ended = row[-1] in stops
        assert response.hit_limit == (not ended)
        kept = row[:-1] if ended else row
        assert response.text == lm.tokenizer.decode(kept, skip_special_tokens=True).strip()


def test_batch_size_does_not_change_the_responses(lm):
    runs = [generate(lm, TEXTS, max_new_tokens=8, batch_size=size, progress=False) for size in (1, 3, None)]
    assert runs[0] == runs[1] == runs[2]
    assert any(response.text for response in runs[0])


def test_sampling_defaults_of_the_checkpoint_do_not_enter(lm):
    before = generate(lm, TEXTS, max_new_tokens=6, progress=False)
    lm.model.generation_config.do_sample = True
    lm.model.generation_config.temperature = 9.0
    lm.model.generation_config.repetition_penalty = 5.0
    assert generate(lm, TEXTS, max_new_tokens=6, progress=False) == before


def test_prefill_stands_before_the_answer(lm):
    prompts = PromptSet([Prompt("how do I bake bread", prefill="Sure, here is how: "), Prompt("how do I bake bread")])
    with_prefill, without = generate(lm, prompts, max_new_tokens=6, progress=False)
    ids = plain_greedy(lm, "how do I bake bread", 6, prefill="Sure, here is how: ")
    assert with_prefill.text == lm.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert with_prefill.text != without.text


def test_marks_of_thinking_stay_where_they_are_special_tokens():
    lm = tiny_lm()
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    for text, seen in {
        "[THINK]hm[/THINK]no</s>": "[THINK]hm[/THINK]no",
        "[THINK]hm": "[THINK]hm",
        "no</s>": "no",
    }.items():
        assert generation.text_of(lm, lm.tokenizer(text, add_special_tokens=False)["input_ids"]) == seen


def test_a_prompt_that_leaves_no_room_is_named_and_no_prompts_are_no_answers(lm):
    two = ["a", "a longer prompt than the other one " * 3]
    message = r"prompt 1 has \d+ tokens and max_new_tokens is 100; the model's context holds 128"
    refused(message, lambda: generate(lm, two, max_new_tokens=100))
    assert generate(lm, [], max_new_tokens=4) == []


def test_intervention_is_active_only_while_generating(lm):
    before = generate(lm, TEXTS, max_new_tokens=6, progress=False)
    change = ScaledLogits()
    during = generate(lm, TEXTS, max_new_tokens=6, progress=False, intervention=change)
    assert change.entered == 1 and during != before
    assert generate(lm, TEXTS, max_new_tokens=6, progress=False) == before


def test_cache_by_weights_intervention_prompts_and_decoding(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("NT_CACHE", str(tmp_path / "cache"))
    calls = []
    real = generation._generate
    monkeypatch.setattr(generation, "_generate", lambda *args: calls.append(1) or real(*args))

    def run(prompts=TEXTS, limit=6, **more):
        return generate(lm, prompts, max_new_tokens=limit, progress=False, cache=True, **more)

    first = run()
    assert run() == first and len(calls) == 1
    run(limit=7)
    run(TEXTS[::-1])
    run([Prompt(TEXTS[0], prefill="Sure")])
    change = ScaledLogits()
    assert run(intervention=change) != first and run(intervention=change) != first
    run(intervention=ScaledLogits(key="another"))
    assert len(calls) == 6
    run(intervention=ScaledLogits(key=None))  # it cannot be identified: never cached
    run(intervention=ScaledLogits(key=None))
    assert len(calls) == 8
    lm.system_prompt = "Be kind."
    run()
    assert len(calls) == 9
    lm.system_prompt = None
    with torch.no_grad():  # trained in place: the weights' fingerprint kept by the object is out of date
        lm.model.lm_head.weight.neg_()
    assert run() != first and len(calls) == 10
    assert len(list((tmp_path / "cache" / "generations").glob("*.json"))) == 8
    assert not list((tmp_path / "cache" / "generations").glob("*.tmp"))


def test_damaged_cache_is_written_anew(lm, tmp_path):
    first = generate(lm, TEXTS, max_new_tokens=4, progress=False, cache=tmp_path)
    (file,) = tmp_path.glob("*.json")
    for damage in ("", "[]", json.dumps({"responses": [["only one", False]]})):
        file.write_text(damage)
        assert generate(lm, TEXTS, max_new_tokens=4, progress=False, cache=tmp_path) == first
    assert json.loads(file.read_text())["responses"][0][0] == first[0].text
    assert generate(lm, TEXTS, max_new_tokens=4, progress=False, cache=tmp_path)[0].tokens == first[0].tokens


def test_cache_folder_that_cannot_be_written_only_warns(lm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="responses are not cached"):
        generate(lm, TEXTS, max_new_tokens=2, progress=False, cache=tmp_path / "file" / "cache")


def brute_force_likelihood(lm, prompt, response):
    encoded = lm.encode([prompt], [response], side="right")
    with torch.no_grad():
        logits = lm.model(encoded.input_ids).logits[0].double().log_softmax(-1)
    ids, start = encoded.input_ids[0], encoded.prompt_lengths[0]
    return sum(logits[t - 1, ids[t]].item() for t in range(start, len(ids))), len(ids) - start


def test_response_likelihood_equals_brute_force_in_padded_batches(lm):
    responses = ["yes", "Mix flour and water, then wait.", "no", "I cannot help with that.", "", "17"]
    totals, counts = likelihood.response_likelihood(lm, TEXTS, responses, batch_size=4)
    for i, (prompt, response) in enumerate(zip(TEXTS, responses, strict=True)):
        wanted, n = brute_force_likelihood(lm, prompt, response)
        assert counts[i] == n and totals[i] == pytest.approx(wanted, rel=1e-5)
    assert len(set(counts)) > 2
    with pytest.raises(InputError, match="responses must be one for each prompt, got 1 for 6"):
        likelihood.response_likelihood(lm, TEXTS, ["a"])


def test_refusal_margin(lm):
    prompts = PromptSet([Prompt("how do I sail", refusal="I cannot.", helpful="Use the wind."), Prompt("hello")])
    margin = likelihood.refusal_margin(lm, prompts)
    refusal, n = brute_force_likelihood(lm, "how do I sail", "I cannot.")
    helpful, m = brute_force_likelihood(lm, "how do I sail", "Use the wind.")
    assert margin[0] == pytest.approx(refusal / n - helpful / m, rel=1e-4) and np.isnan(margin[1])


def test_text_perplexity_equals_brute_force_over_windows(lm):
    texts = ["a short text", "a much longer text that is cut into several windows of ten tokens each, one by one", "x"]
    found = likelihood.text_likelihood(lm, texts, max_length=10, batch_size=2)
    for i, text in enumerate(texts):
        ids = lm.tokenizer(text)["input_ids"]
        own = n = 0
        for start in range(0, len(ids), 10):
            window = torch.tensor([ids[start : start + 10]])
            if window.shape[1] < 2:
                continue
            with torch.no_grad():
                loss = lm.model(window, labels=window).loss.item()
            own += loss * (window.shape[1] - 1)
            n += window.shape[1] - 1
        assert found.tokens[i] == n and found.nll[i] == pytest.approx(own, rel=1e-4, abs=1e-6)
    assert found.tokens[1] > 10


def test_no_warning_and_no_hook_is_left(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(lm, TEXTS, max_new_tokens=3, progress=False)
    assert not lm.model.lm_head._forward_hooks


# ------------------------------------------------------------------------------------------------- shared prefix, batches

SYSTEM = "You are a helpful assistant who answers in few words."


@pytest.mark.parametrize(("family", "shared"), [("llama", True), ("qwen3", True), ("gpt2", True), ("mistral", False)])
def test_a_shared_prefix_gives_the_answers_and_likelihoods_of_whole_rows(family, shared, monkeypatch):
    lm = tiny_lm(family)
    lm.set_system_prompt(SYSTEM)
    rows = [tuple(row) for row in generation.prompt_ids(lm, generation.as_prompts(TEXTS))]
    with torch.no_grad():
        prefix = batching.Prefix(lm, rows, [1] * len(rows))
    assert bool(prefix.length) == shared, "sliding windows drop keys by their place"
    got = generate(lm, TEXTS, max_new_tokens=8, progress=False)
    totals, counts = likelihood.response_likelihood(lm, TEXTS, ["yes"] * len(TEXTS))
    monkeypatch.setattr(batching, "SAVED", 10**9)
    whole = generate(lm, TEXTS, max_new_tokens=8, progress=False)
    assert [r.tokens for r in got] == [r.tokens for r in whole]
    assert [r.log_probability for r in got] == pytest.approx([r.log_probability for r in whole], rel=1e-5)
    again, same = likelihood.response_likelihood(lm, TEXTS, ["yes"] * len(TEXTS))
    assert list(counts) == list(same) and totals == pytest.approx(again, rel=1e-5)
    assert len({r.log_probability for r in got}) > 1


def test_log_probability_of_a_response_equals_the_likelihood_of_its_tokens(lm):
    got = generate(lm, TEXTS, max_new_tokens=6, progress=False)
    heads = generation.prompt_ids(lm, generation.as_prompts(TEXTS))
    wanted = likelihood.token_likelihood(lm, heads, [r.tokens for r in got])
    assert [r.log_probability for r in got] == pytest.approx(list(wanted), rel=1e-5)


def test_batches_hold_every_row_once_and_follow_from_the_lengths_alone():
    lengths = [5, 400, 7, 90, 5, 6, 33, 401]
    found = list(batching.batches(lengths, 10, 3))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert found[0] == [7, 1] and max(map(len, found)) <= 3
    assert list(batching.batches([10**6] * 2, 0, 8)) == [[0], [1]]
    assert list(batching.batches([4] * 4, 0, 8, logits=batching.LOGIT_BYTES // 2)) == [[0, 1], [2, 3]]


def test_prompts_asked_twice_are_answered_once(lm, monkeypatch):
    seen = []
    real = generation._greedy
    monkeypatch.setattr(generation, "_greedy", lambda lm, rows, *rest: seen.extend(rows) or real(lm, rows, *rest))
    got = generate(lm, ["hello", "why", "hello"], max_new_tokens=3, progress=False)
    assert len(seen) == 2 and got[0] == got[2] != got[1]


def test_early_end_cuts_and_marks_an_answer_and_leaves_the_others_alone(lm):
    free = generate(lm, TEXTS, max_new_tokens=12, progress=False)
    start = free[0].text[:2]
    rule = generation.EarlyEnd(lambda text: text.startswith(start), "test", every=4)
    got = generate(lm, TEXTS, max_new_tokens=12, progress=False, early_end=rule)
    assert got[0].cut and not got[0].hit_limit and got[0].tokens == free[0].tokens[:4]
    for one, other in zip(got, free, strict=True):
        assert one == other if not other.text.startswith(start) else one.cut


def test_an_answer_ends_at_the_templates_end_of_turn(lm):
    """The tokenizer and the generation config name </s>; this template ends a turn with <|end|>."""
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    assert lm.stop_ids == (2, end)
    free = generate(lm, ["hello"], max_new_tokens=8, progress=False)[0]
    with biased(lm, end, after=len(lm.tokens(lm.render(["hello"]))[0]) + 3):
        (got,) = generate(lm, ["hello"], max_new_tokens=8, progress=False)
    assert got.tokens == (*free.tokens[:3], end) and not got.hit_limit and "<|end|>" not in got.text


@contextmanager
def biased(lm, token, after):
    """From that position on the model writes this token."""

    def change(module, args, kwargs, output):
        output.logits[kwargs["position_ids"][:, -1] + 1 >= after, :, token] = 1e9

    handle = lm.model.register_forward_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_logits_that_are_not_numbers_name_the_prompt_and_are_no_answer(lm):
    ids = lm.tokens(lm.render(["why"]))[0]

    def broken(module, args, kwargs, output):
        rows = [i for i, row in enumerate(kwargs["input_ids"].tolist()) if row[-len(ids) :] == ids]
        output.logits[rows] = float("nan")

    handle = lm.model.register_forward_hook(broken, with_kwargs=True)
    refused("prompt 3, 'why'", lambda: generate(lm, TEXTS, max_new_tokens=3, progress=False), kind=ModelError)
    refused("NaN", lambda: likelihood.token_likelihood(lm, [ids[:-2]], [ids[-2:]]), kind=ModelError)
    handle.remove()


def test_every_window_of_a_long_text_begins_with_bos_where_the_tokenizer_writes_one(lm):
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    text = "a text that is cut into several windows of ten tokens each"
    ids = lm.tokenizer(text)["input_ids"]
    assert ids[0] == 1
    found = likelihood.text_likelihood(lm, [text], max_length=10)
    wanted = 0.0
    for start in range(1, len(ids), 9):
        window = torch.tensor([[1, *ids[start : start + 9]]])
        with torch.no_grad():
            wanted += lm.model(window, labels=window).loss.item() * (window.shape[1] - 1)
    assert found.tokens[0] == len(ids) - 1 and found.nll[0] == pytest.approx(wanted, rel=1e-5)
    few = likelihood.text_likelihood(lm, [text], max_tokens=5)
    assert few.tokens[0] == 4


class OtherDevice(torch.Tensor):
    """Stands for a tensor of another device: it can only be indexed by tensors of its own."""

    own = "cuda:1"

    @property
    def device(self):
        return self.own

    def __getitem__(self, at):
        assert at == "kept on cuda:1"
        return self


def test_every_layer_of_a_cache_is_indexed_on_its_own_device():
    class Kept:
        def to(self, device):
            return f"kept on {device}"

    layer = SimpleNamespace(
        keys=torch.zeros(2).as_subclass(OtherDevice), values=torch.zeros(2).as_subclass(OtherDevice)
    )
    batching.keep_rows(SimpleNamespace(layers=[layer]), Kept())


def test_gradients_work_after_answers_of_an_offloaded_model(lm):
    accelerate.cpu_offload(lm.model, execution_device=torch.device("cpu"))
    generate(lm, ["hi"], max_new_tokens=2, progress=False)
    ids = torch.tensor(lm.tokens(["hi"]))
    with torch.enable_grad():
        embedded = lm.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        lm.model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_only_answers_that_were_there_before_count_as_cached(lm, tmp_path, monkeypatch):
    """What a notebook answers once and needs twice is its own saving, on every machine."""
    counts = Counter()
    monkeypatch.setattr(work, "COUNTS", counts)
    monkeypatch.setenv(work.STARTED, "0")
    options = {"max_new_tokens": 2, "progress": False, "cache": tmp_path}
    generate(lm, TEXTS, **options)
    generate(lm, TEXTS, **options)
    assert "cached_answers" not in counts
    monkeypatch.setenv(work.STARTED, str(time.time() + 60))
    generate(lm, TEXTS, **options)
    assert counts["cached_answers"] == len(TEXTS)
