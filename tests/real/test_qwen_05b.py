"""Qwen2.5-Coder-0.5B-Instruct itself: the file, its template, and exact scores and hooks on the vendor's weights, in float32.

`make test-real` runs these; it downloads half a gigabyte where the file is not at hand. `make test` leaves them out.
"""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from nt_utils import models
from nt_utils.interventions import Deactivate
from nt_utils.interventions.export import folded
from nt_utils.interventions.modulation import Modulation
from nt_utils.models import box, gguf
from nt_utils.neurons import KINDS, NeuronSet
from nt_utils.scoring.importance import score_batch
from nt_utils.scoring.reference import importance_by_hand

NAME = "qwen2.5-coder-0.5b-instruct"
PROMPT = "How do I bake bread?"


@pytest.fixture(scope="module")
def lm():
    return models.load(NAME, dtype="float32")


def test_the_weights_come_from_the_file_that_the_table_names():
    origin = gguf.origin(models.located(NAME))
    assert origin["sha256"] == box.table()[NAME]["sha256"]
    folder = os.environ.get("NT_MODELS")
    if folder and (file := Path(folder) / f"{NAME}-q4_k_m.gguf").is_file():
        with file.open("rb") as content:
            assert hashlib.file_digest(content, "sha256").hexdigest() == origin["sha256"]


def test_a_prompt_is_written_as_the_vendor_publishes_it(lm):
    """The example of Qwen2.5's model card, without a system prompt of one's own."""
    wanted = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert lm.render(["Hello"]) == [wanted]


@pytest.mark.parametrize("layer", [0, 12, 23])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_scores_equal_brute_force(lm, layer, kind):
    """The strongest neurons, the weakest that is not vacuous, and some between; all over the prompt."""
    scores = score_batch(lm.view, lm.encode([PROMPT], side="right"))[layer, kind][0].double()
    order = scores.argsort(descending=True)
    chosen = order[[0, 1, 2, len(order) // 4, len(order) // 2]].tolist()
    by_hand = importance_by_hand(lm.view, lm.encode([PROMPT], side="right").input_ids, layer, kind, chosen)
    assert by_hand.min() > 0 and by_hand[0] > 1.1 * by_hand[-1], "the neurons differ"
    assert torch.allclose(scores[chosen], by_hand, rtol=1e-4, atol=0), (
        scores[chosen],
        by_hand,
    )


def test_zeroing_by_hook_is_zeroing_in_the_weights(lm):
    space = lm.view.space
    masks = {
        (layer, kind): torch.arange(space.width((layer, kind))) % 50 == 0
        for layer in (0, 12, 23)
        for kind in ("ffn", "o")
    }
    neurons = NeuronSet(space, masks)
    batch = lm.encode([PROMPT], side="right")

    def logits():
        with torch.no_grad():
            return lm.model(**batch.inputs, use_cache=False).logits

    plain = logits()
    with Deactivate(neurons).active(lm):
        hooked = logits()
    with folded(lm, Modulation(neurons, NeuronSet(space, {}), torch.zeros(len(neurons)))):
        written = logits()
    assert (hooked - written).abs().max() < 1e-4 * plain.abs().max() < 0.1 * (hooked - plain).abs().max()
