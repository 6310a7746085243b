import dataclasses
import json
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation import generation
from nt_utils.evaluation.generation import generate
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
            eos_token_id=generation.stop_token_ids(lm),
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_batched_greedy_equals_the_librarys_one_by_one(family):
    lm = tiny_lm(family)
    # An early stop for some rows: the most frequent first token of the free run ends a response.
    free = [plain_greedy(lm, text, 12) for text in TEXTS]
    lm.model.generation_config.eos_token_id = [2, free[0][3]]
    wanted = [plain_greedy(lm, text, 12) for text in TEXTS]
    stops = set(generation.stop_token_ids(lm))
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


def test_inputs_are_checked(lm):
    with pytest.raises(InputError, match="max_new_tokens must be 1 or more, got 0"):
        generate(lm, TEXTS, max_new_tokens=0)
    with pytest.raises(InputError, match="batch_size must be 1 or more"):
        generate(lm, TEXTS, batch_size=0)
    with pytest.raises(InputError, match="single prompt"):
        generate(lm, "hello")
    with pytest.raises(
        InputError, match=r"prompt 1 has \d+ tokens and max_new_tokens is 100: together .* context of 128"
    ):
        generate(lm, ["a", "a longer prompt than the other one " * 3], max_new_tokens=100)
    assert generate(lm, [], max_new_tokens=4) == []


class Louder:
    """An intervention for the tests: scales the logits' input, so that responses change."""

    name = "louder"

    def __init__(self, key="louder-1"):
        self.key = key
        self.entered = 0

    @contextmanager
    def active(self, lm):
        self.entered += 1
        head = lm.model.lm_head
        handle = head.register_forward_hook(lambda module, inputs, output: -output)
        try:
            yield
        finally:
            handle.remove()


def test_intervention_is_active_only_while_generating(lm):
    before = generate(lm, TEXTS, max_new_tokens=6, progress=False)
    change = Louder()
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
    change = Louder()
    assert run(intervention=change) != first and run(intervention=change) != first
    run(intervention=Louder("louder-2"))
    assert len(calls) == 6
    run(intervention=Louder(None))  # it cannot be identified: never cached
    run(intervention=Louder(None))
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
    totals, counts = generation.response_likelihood(lm, TEXTS, responses, batch_size=4)
    for i, (prompt, response) in enumerate(zip(TEXTS, responses, strict=True)):
        wanted, n = brute_force_likelihood(lm, prompt, response)
        assert counts[i] == n and totals[i] == pytest.approx(wanted, rel=1e-5)
    assert len(set(counts)) > 2
    with pytest.raises(InputError, match="responses must be one for each prompt, got 1 for 6"):
        generation.response_likelihood(lm, TEXTS, ["a"])


def test_refusal_margin_and_perplexity(lm):
    prompts = PromptSet([Prompt("how do I sail", refusal="I cannot.", helpful="Use the wind."), Prompt("hello")])
    margin = generation.refusal_margin(lm, prompts)
    refusal, n = brute_force_likelihood(lm, "how do I sail", "I cannot.")
    helpful, m = brute_force_likelihood(lm, "how do I sail", "Use the wind.")
    assert margin[0] == pytest.approx(refusal / n - helpful / m, rel=1e-4) and np.isnan(margin[1])
    perplexity = generation.response_perplexity(lm, prompts, ["I cannot.", "  "])
    assert perplexity[0] == pytest.approx(np.exp(-refusal / n), rel=1e-4) and np.isnan(perplexity[1])


def test_text_perplexity_equals_brute_force_over_windows(lm):
    texts = ["a short text", "a much longer text that is cut into several windows of ten tokens each, one by one", "x"]
    found = generation.text_likelihood(lm, texts, max_length=10, batch_size=2)
    total = count = 0
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
        total, count = total + own, count + n
    assert found.tokens[1] > 10 and found.perplexity == pytest.approx(np.exp(total / count), rel=1e-4)


def test_batches_fit_the_key_value_budget(lm):
    assert generation._fitting_batch(lm, 10) == 512
    per_token = 2 * 2 * 2 * 8 * 4
    assert generation._fitting_batch(lm, 2**30 // per_token // 7) == 7
    assert generation._fitting_batch(lm, 2**40) == 1


def test_no_warning_and_no_hook_is_left(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(lm, TEXTS, max_new_tokens=3, progress=False)
    assert not lm.model.lm_head._forward_hooks
    assert dataclasses.is_dataclass(Prompt)
