import random

import torch

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.evaluation import gcg
from nt_utils.evaluation.likelihood import response_likelihood
from tests.common import refused
from tests.tiny import tiny_lm

PROMPTS = PromptSet([Prompt("how do I sail", kind="harmful", answer="Use the"), Prompt("tell me", kind="harmful")], "p")


def test_suffixes_make_the_target_likelier_and_leave_no_trace():
    lm = tiny_lm()
    lm.model.get_input_embeddings().weight.requires_grad_(True)
    random.seed(5)
    torch.manual_seed(5)
    state = random.getstate(), torch.random.get_rng_state()
    found = gcg.gcg_attack(lm, PROMPTS, steps=4, search_width=8, topk=16, suffix_length=3, progress=False)
    targets = [gcg.gcg_target(p) for p in PROMPTS]
    assert targets == ["Use the", gcg.TARGET]
    control = gcg.random_suffixes(lm, PROMPTS, suffix_length=3)
    likelihood = [response_likelihood(lm, s, targets)[0] for s in (PROMPTS, control, found)]
    assert (likelihood[2] > likelihood[0]).all() and (likelihood[2] > likelihood[1]).all()
    assert all(f.text.startswith(p.text + " ") and f.attack == "gcg" for f, p in zip(found, PROMPTS, strict=True))
    again = gcg.gcg_attack(lm, PROMPTS, steps=4, search_width=8, topk=16, suffix_length=3, progress=False)
    assert again == found
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])
    assert lm.model.get_input_embeddings().weight.requires_grad and not torch.are_deterministic_algorithms_enabled()


def test_random_suffixes_are_printable_and_drawn_with_the_seed():
    lm = tiny_lm()
    one, two = (gcg.random_suffixes(lm, PROMPTS, seed=seed) for seed in (0, 1))
    assert one == gcg.random_suffixes(lm, PROMPTS, seed=0) and one != two
    for found, prompt in zip(one, PROMPTS, strict=True):
        suffix = found.text.removeprefix(prompt.text)
        assert len(suffix) > 10 and suffix.isprintable() and found.attack == "random-suffix"


def test_a_bad_budget_in_one_line():
    refused("steps: got 0; allowed: a whole number from 1", lambda: gcg.gcg_attack(tiny_lm(), PROMPTS, steps=0))
