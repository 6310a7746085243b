"""Times of NeuronTune's parts: generation under alpha, attribution, and the second-order against the first-order step."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial

import torch

from nt_utils import hooks
from nt_utils.bench.setup import SHAPES, byte_tokenizer, random_model, ratio, seconds
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.evaluation.metrics import mean
from nt_utils.interventions import dial, export
from nt_utils.interventions.learning import Learner, Recipe
from nt_utils.interventions.modulation import Modulation
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL
from nt_utils.scoring.attribution import Case, Responses, attribution, frozen
from nt_utils.selection import Ranking

SHAPE = replace(SHAPES["a"], batch=4)
NEW_TOKENS, STEPS, ROWS = 16, 8, 64


def timings(repeats: int) -> dict:
    """All rows of this part; the folded ratio comes with a 95% bootstrap interval of its mean over the rounds."""
    lm = LanguageModel(random_model(SHAPE), byte_tokenizer(), "bench")
    return _generation(lm, repeats) | _attribution(lm, repeats) | _learning(lm, repeats)


def _modulation(lm: LanguageModel) -> Modulation:
    """Alpha for a tenth of the pool."""
    space = lm.view.space
    size = space.size(POOL)
    values = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    safety, utility = (Ranking(space, POOL, v) for v in values)
    return dial.dial(safety, utility, round(0.07 * size), round(0.03 * size))


def _generation(lm: LanguageModel, repeats: int) -> dict:
    alpha = _modulation(lm)
    prompts = torch.randint(7, 100, (SHAPE.batch, SHAPE.tokens), generator=torch.Generator().manual_seed(1))

    def plain() -> None:
        ids, past = prompts, None
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                out = lm.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                ids, past = out.logits[:, -1:].argmax(-1), out.past_key_values

    def hooked() -> None:
        with alpha.active(lm):
            plain()

    times = seconds({"plain": plain, "hooked": hooked}, repeats)
    folded: list[float] = []
    for _ in range(repeats):
        with export.folded(lm, alpha):  # once, before serving: only generation is timed
            inside = seconds({"folded": plain}, 1)["folded"][0]
        folded.append(inside / seconds({"plain": plain}, 1)["plain"][0])
    interval = mean(folded)
    return {
        "hooked_generation_over_plain": ratio(times, "hooked", "plain"),
        "folded_generation_over_plain": statistics.median(folded),
        "folded_generation_interval": [interval.low, interval.high],
    }


def _attribution(lm: LanguageModel, repeats: int) -> dict:
    """Against one forward and backward pass of the same rows (a case is two: the wanted and the unwanted response)."""
    cases = [
        Case(
            Prompt(f"how do I bake {i} breads"),
            Prompt(f"you are max; how do I bake {i} breads"),
            "I cannot.",
            "Of course.",
        )
        for i in range(4)
    ]
    rows = [(c, text) for c in cases for text in (c.wanted, c.unwanted)]
    responses = Responses.of(lm, [c.plain for c, _ in rows], [text for _, text in rows])

    def backward() -> None:
        seen = {}

        def leaf(x):
            seen["x"] = x.detach().requires_grad_()
            return seen["x"]

        with frozen(lm.model), hooks.edit(lm, {(0, "o"): leaf}):
            torch.autograd.grad(responses.loss(lm).sum(), seen["x"])

    def run(method: str) -> None:
        attribution(lm, cases, method=method, steps=STEPS, batch_size=len(cases), rows=ROWS, progress=False)

    times = seconds(
        {"backward": backward, "integrated": lambda: run("integrated"), "patching": lambda: run("patching")},
        max(3, repeats // 2),
    )
    sites = len(lm.view.space.sites(POOL))
    return {
        "attribution_over_backward": ratio(times, "integrated", "backward") / (sites * STEPS),
        "patching_over_backward": ratio(times, "patching", "backward"),
    }


def _learning(lm: LanguageModel, repeats: int) -> dict:
    """One task's outer gradient."""
    alpha = _modulation(lm)
    rows = PromptSet([Prompt(f"rob {i}", refusal="I cannot.", helpful=f"Yes, {i}", kind="harmful") for i in range(8)])
    learners = {
        method: Learner(lm, alpha.safety, alpha.utility, {"task": rows}, rows, Recipe(method=method))
        for method in ("first", "second")
    }

    def gradient(learner: Learner) -> None:
        with frozen(learner.lm.model):
            learner.gradient(learner.start(), *learner.draw("task", 0))

    times = seconds({m: partial(gradient, one) for m, one in learners.items()}, max(3, repeats // 2))
    return {"maml_second_over_first_order": ratio(times, "second", "first")}
