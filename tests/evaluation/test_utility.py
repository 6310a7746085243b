import math

import numpy as np
import pytest
import torch

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.evaluation import generation, likelihood, utility
from nt_utils.evaluation.suite import Suite, SuiteSet, evaluate
from nt_utils.interventions.steering import SystemPrompt
from tests.common import ScaledLogits, refused
from tests.tiny import tiny_lm

BENIGN = PromptSet(
    [Prompt(text, kind="benign", helpful="Mix it well.") for text in ("bake bread", "sail", "tell me a tale", "why")]
)


@pytest.fixture
def lm():
    return tiny_lm()


def test_prose_is_real_text_the_same_every_time():
    found = utility.prose(20)
    assert found.fingerprint == utility.prose(20).fingerprint != utility.prose(20, seed=1).fingerprint
    assert len(set(found.texts)) == 20 and all(len(text.split()) >= 120 for text in found.texts)
    assert all(text.endswith(".") and "::=" not in text and ">>>" not in text for text in found.texts)
    refused("n: got 100000", lambda: utility.prose(100_000))


def brute_force_kl(lm, prompt, by, positions):
    """One prompt, one position at a time, without caches or batches."""
    ids, values = generation.prompt_ids(lm, [prompt])[0], []
    stops = lm.stop_ids
    with torch.no_grad():
        for _ in range(positions):
            logits = lm.model(torch.tensor([ids])).logits[0, -1].double()
            was, now = logits.log_softmax(-1), (by * logits).log_softmax(-1)
            values.append(float((was.exp() * (was - now)).sum()))
            ids = [*ids, int(logits.argmax())]
            if ids[-1] in stops:
                break
    return sum(values) / len(values)


def test_kl_equals_brute_force_on_the_untouched_models_own_answers(lm):
    reference = utility.untouched(lm, BENIGN, positions=5)
    with ScaledLogits(0.5).active(lm):
        found = utility.kl(lm, reference)
    wanted = [brute_force_kl(lm, prompt, 0.5, 5) for prompt in BENIGN]
    assert min(wanted) > 1e-3 and found == pytest.approx(wanted, rel=1e-2)
    assert utility.kl(lm, reference) == pytest.approx(np.zeros(4), abs=1e-5), "nothing changed: no divergence"


def test_what_a_system_prompt_changes_is_seen(lm):
    reference = utility.untouched(lm, BENIGN, positions=3)
    with SystemPrompt("Answer in verse.").active(lm):
        assert utility.kl(lm, reference).min() > 1e-4


def test_reference_is_kept_while_the_model_stays_as_it_is(lm, monkeypatch):
    first = utility.untouched(lm, BENIGN)
    assert utility.untouched(lm, BENIGN) is first
    with torch.no_grad():
        lm.model.lm_head.weight.neg_()
    assert utility.untouched(lm, BENIGN) is not first
    monkeypatch.setattr(utility, "KEPT_BYTES", 2 * 16 * 300 * 3)
    refused("kl: at most 3 prompts", lambda: utility.untouched(lm, BENIGN))


def test_utility_metrics_of_an_evaluation_have_one_value_a_prompt_and_an_interval(lm):
    texts = utility.prose(4)
    suite = Suite(
        (
            SuiteSet("benign", BENIGN, ("compliance", "kl", "reference_likelihood")),
            SuiteSet("text", texts, ("perplexity", "log_perplexity"), max_tokens=40),
        ),
        max_new_tokens=4,
    )
    before, after = (
        evaluate(lm, suite, intervention=i, cache=False, progress=False) for i in (None, ScaledLogits(0.5))
    )
    for metric in ("kl", "reference_likelihood"):
        assert after.values("benign", metric).notna().all()
        found = after.rate("benign", metric)
        assert found.low < found.value < found.high and found.n == 4
    assert before.rate("benign", "kl").value == pytest.approx(0, abs=1e-5) and after.rate("benign", "kl").value > 0.01
    totals, counts = likelihood.response_likelihood(lm, BENIGN, ["Mix it well."] * 4)
    assert before.values("benign", "reference_likelihood").to_numpy() == pytest.approx(totals / counts, rel=1e-5)
    assert list(before.rows.loc[before.rows["set"] == "text", "tokens"]) == [39] * 4
    mean = before.rate("text", "log_perplexity").value
    assert before.rate("text", "perplexity").value == pytest.approx(math.exp(mean))
    ratio = utility.perplexity_ratio(before, after, "text")
    assert ratio.value == pytest.approx(
        after.rate("text", "perplexity").value / before.rate("text", "perplexity").value
    )
    assert ratio.low <= ratio.value <= ratio.high and ratio.n == 4
    assert utility.perplexity_ratio(before, before, "text")[:3] == (1.0, 1.0, 1.0)


def test_a_set_is_either_answered_or_read():
    refused("use two sets", lambda: SuiteSet("both", BENIGN, ("refusal", "perplexity")))
