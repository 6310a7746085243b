"""How far alignment moved each neuron's activation while a response is generated [Chen et al. 2024, arXiv 2406.14144].

An outside definition of safety neurons, for comparison ("generation-time activation contrasting", section 3.1): the root
mean square, over the tokens of the generated responses, of the difference between the neuron's activation in the aligned
and in the unaligned model, both reading the same text. The activation at the position that predicts a token counts.

Ours, where the paper leaves it open: the text is the **aligned model's own** response to each harmful prompt (the published
code takes either model's); beside the paper's FFN neurons the o_proj inputs are scored, so that the pool is the common one;
activations are compared as they are, unscaled. Scores are kept as sums of squares a prompt, with the tokens they are over:
:func:`nt_utils.selection.root_mean_square` gives the paper's number for any subset of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nt_utils import hooks
from nt_utils.data.records import Prompt
from nt_utils.errors import InputError
from nt_utils.models import LanguageModel, decoder
from nt_utils.neurons import POOL, NeuronScores, ScoreWriter, check_kinds
from nt_utils.scoring.attribution import Responses
from nt_utils.scoring.saliency import batches, check_pairs


def activation_change(
    aligned: LanguageModel,
    unaligned: LanguageModel,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    kinds: Sequence[str] = POOL,
    batch_size: int = 8,
    path=None,
    progress: bool = True,
) -> NeuronScores:
    """Summed squared activation difference of each neuron over each response's tokens.

    Args:
        aligned, unaligned: two models of one architecture and tokenizer, in evaluation mode.
        prompts, responses: harmful prompts and what was generated for them.
        batch_size: prompts in one pass; path: the score file, default a temporary one.

    Returns:
        Float32 scores [n_prompts, width] per site, on file; ``meta["tokens"]`` has each response's number of tokens.

    Raises:
        InputError: models of two architectures, prompts without responses, a model in training mode, NaN or Inf.
    """
    check_kinds(kinds)
    for lm in (aligned, unaligned):
        check_pairs(lm, prompts, responses)
    space = aligned.view.space
    if unaligned.view.space.architecture != space.architecture:
        raise InputError(
            f"unaligned: its architecture {unaligned.view.space.architecture} is not the aligned one's, {space.architecture}"
        )
    tokens = _token_counts(aligned, prompts, responses)
    meta = {"score": "activation change", "model": aligned.name, "unaligned": unaligned.name, "tokens": tokens}
    with ScoreWriter(path, space, kinds, len(prompts), meta) as writer:
        for start, batch in batches(aligned, prompts, responses, batch_size, "activation change", progress):
            first, second = (_activations(lm, batch, space.sites(kinds)) for lm in (aligned, unaligned))
            scores = {}
            for site, values in first.items():
                squares = (values - second[site].to(values)) ** 2
                empty = squares.new_zeros(batch.size, squares.shape[1])
                scores[site] = empty.index_add(0, batch.rows.to(squares.device), squares)
            writer.write(start, scores)
        return writer.close()


def _token_counts(lm: LanguageModel, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[int]:
    counts: list[int] = []
    for _, batch in batches(lm, prompts, responses, 64, "tokens", False):
        counts += torch.bincount(batch.rows.cpu(), minlength=batch.size).tolist()
    return counts


def _activations(lm: LanguageModel, batch: Responses, sites) -> dict:
    """Activations [tokens, width] at the positions that predict the response's tokens."""
    with torch.no_grad(), hooks.capture(lm, sites) as seen:
        decoder(lm.model)(**{k: v.to(lm.device) for k, v in batch.batch.inputs.items()}, use_cache=False)
        return {site: batch.take(values).float() for site, values in seen.items()}
