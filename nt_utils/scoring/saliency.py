"""Weight importance on prompts with responses, summed up per neuron [Wei et al., ICML 2024, arXiv 2402.05162].

An outside definition of safety neurons, for comparison: what matters for safe responses and not for helpful ones, by the
pruning scores of single weights. Per weight and prompt, with L the mean negative log-likelihood of the response's tokens:

* ``snip``: ``|W_ij * dL/dW_ij|`` (section 3.1, after Lee et al., ICLR 2019);
* ``wanda``: ``|W_ij| * ||X_j||_2``, X the inputs at the response's tokens (section 3.1, after Sun et al., ICLR 2024).

Ours, where the paper works on single weights: a neuron's score is the **mean over the weights it owns** (an FFN neuron: its
rows of gate and up and its column of down; a mean, so that kinds that own more do not rank higher by size alone), biases
left out; averages over prompts are of per-prompt scores, for wanda too. The set difference itself (top q% on safety data
minus top p% on utility data) is :func:`nt_utils.selection.set_difference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nt_utils import hooks
from nt_utils.data.records import Prompt
from nt_utils.errors import InputError, check_choice
from nt_utils.models import OWNED, LanguageModel, Projection, check_evaluating, decoder
from nt_utils.neurons import POOL, NeuronScores, ScoreWriter, Site, check_kinds
from nt_utils.scoring.attribution import Responses, frozen
from nt_utils.work import track

METRICS = ("snip", "wanda")


def saliency(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    metric: str = "snip",
    kinds: Sequence[str] = POOL,
    batch_size: int = 8,
    path=None,
    progress: bool = True,
) -> NeuronScores:
    """Mean importance of each neuron's weights for each prompt's response.

    No gradient of a weight is kept: a prompt's is formed one matrix at a time from the module's inputs and the gradient
    of its outputs.

    Args:
        lm: the model, in evaluation mode; its weights do not change.
        prompts, responses: what is asked and the response whose likelihood counts (refusals for safety, helpful answers
            for utility).
        metric: "snip" or "wanda".
        batch_size: prompts in one pass; path: the score file, default a temporary one.

    Returns:
        Float32 scores [n_prompts, width] per site, on file.

    Raises:
        InputError: an unknown metric or kind, prompts without responses, a model in training mode, NaN or Inf.
    """
    check_choice("metric", metric, METRICS)
    check_kinds(kinds)
    check_pairs(lm, prompts, responses)
    work = {"snip": _snip, "wanda": _wanda}[metric]
    meta = {"score": f"saliency {metric}", "model": lm.name}
    with ScoreWriter(path, lm.view.space, kinds, len(prompts), meta) as writer, frozen(lm.model):
        for start, batch in batches(lm, prompts, responses, batch_size, metric, progress):
            writer.write(start, work(lm, batch, lm.view.space.sites(kinds)))
        return writer.close()


def check_pairs(lm: LanguageModel, prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
    """Raise InputError unless every prompt has a response and the model is in evaluation mode."""
    if not len(prompts) or len(prompts) != len(responses):
        raise InputError(f"responses: got {len(responses)} for {len(prompts)} prompts; at least one of each is needed")
    check_evaluating(lm.model)


def batches(lm: LanguageModel, prompts, responses, batch_size: int, label: str, progress: bool):
    """(number of the first prompt, its batch of responses), with a progress bar."""
    steps = range(0, len(prompts), batch_size)
    for start in track(steps, desc=label, unit="batch", disable=not progress):
        rows = slice(start, start + batch_size)
        yield start, Responses.of(lm, prompts[rows], responses[rows])


def _owned(lm: LanguageModel, site: Site) -> list[tuple[Projection, int]]:
    """(projection, axis along which a neuron's own weights lie) for a site: rows own axis 1, columns axis 0."""
    layer, kind = site
    roles = [(role, side) for role, side in OWNED[kind] if role != "gate" or lm.view.gated]
    return [(lm.view.projection(layer, role), int(side == "input")) for role, side in roles]


def _per_neuron(lm: LanguageModel, sites: Sequence[Site], rows: int, weights_of: Callable[[Projection, int], Tensor]):
    """Mean over a neuron's weights of ``weights_of(projection, row)`` [outputs, inputs], for each site [rows, width]."""
    found: dict[Site, list] = {site: [] for site in sites}
    for row in range(rows):
        for site, means in found.items():
            owned = [(weights_of(projection, row), axis) for projection, axis in _owned(lm, site)]
            count = sum(values.shape[axis] for values, axis in owned)
            means.append(sum(values.sum(axis) for values, axis in owned) / count)
    return {site: torch.stack(means) for site, means in found.items()}


def _modules(lm: LanguageModel, sites: Sequence[Site]) -> list[nn.Module]:
    return list(dict.fromkeys(projection.module for site in sites for projection, _ in _owned(lm, site)))


def _snip(lm: LanguageModel, batch: Responses, sites: Sequence[Site]) -> dict[Site, Tensor]:
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # The first modules depend on nothing that asks for gradients: their outputs become the graph's leaves.
        inputs[module] = args[0].detach()
        outputs[module] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[module]

    modules = _modules(lm, sites)
    with torch.enable_grad(), hooks.attached([hooks.after(m, keep) for m in modules]):
        loss = batch.loss(lm).sum()
    slopes = dict(zip(modules, torch.autograd.grad(loss, [outputs[m] for m in modules]), strict=True))

    def weights(projection: Projection, row: int) -> Tensor:
        slope = projection.take(slopes[projection.module][row]).float()
        return (projection.weight * (slope.t() @ inputs[projection.module][row].float())).abs()

    return _per_neuron(lm, sites, batch.size, weights)


def _wanda(lm: LanguageModel, batch: Responses, sites: Sequence[Site]) -> dict[Site, Tensor]:
    norms: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple) -> None:
        taken = batch.take(args[0], start=-1).float() ** 2  # the response's own tokens follow those that predict them
        rows = batch.rows.to(taken.device)
        norms[module] = taken.new_zeros(batch.size, taken.shape[1]).index_add(0, rows, taken).sqrt()

    with torch.no_grad(), hooks.attached([hooks.before(m, keep) for m in _modules(lm, sites)]):
        decoder(lm.model)(**batch.batch.inputs, use_cache=False)

    def weights(projection: Projection, row: int) -> Tensor:
        return projection.weight.float().abs() * norms[projection.module][row]

    return _per_neuron(lm, sites, batch.size, weights)
