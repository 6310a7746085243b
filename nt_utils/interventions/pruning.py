"""Pruning: a channel's value becomes 0, or its mean over a data set, while active or in a checkpoint [SSAH, section 3].

Replacing by the mean is structured pruning with bias correction (An et al., FLAP, AAAI 2024): a constant channel adds
the constant ``W[:, j] mean_j`` to what reads it, which a bias can carry. **Ours**: the mean is that of utility data.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nt_utils import hooks
from nt_utils.errors import InputError
from nt_utils.interventions.export import check_plain, new_folder
from nt_utils.models import DecoderView, LanguageModel, Projection
from nt_utils.neurons import POOL, NeuronSet, Site
from nt_utils.scoring.fluctuation import Fluctuation

#: The config flag that gives the projection that reads a kind its bias, where a family has one; the other biases it
#: brings are zero. GPT-2 and GPT-NeoX always have both; a family with neither entry cannot hold a correction.
BIAS_FLAGS = {
    "llama": {"o": "attention_bias", "ffn": "mlp_bias"},
    "granite": {"o": "attention_bias", "ffn": "mlp_bias"},
    "gemma2": {"o": "attention_bias"},
    "gemma3_text": {"o": "attention_bias"},
    "olmo2": {"o": "attention_bias"},
    "qwen3": {"o": "attention_bias"},
}
#: The config's name of the number of FFN channels.
WIDTH = {"gpt2": "n_inner"}


@dataclass(frozen=True)
class Prune:
    """Set channels to 0 or to given means.

    Args:
        neurons: FFN channels and o_proj inputs (``UnitMap.set`` gives them).
        means: site -> float [width], the value of each channel; sites left out are set to 0. See :meth:`to_mean`.

    Raises:
        InputError: an empty set, neurons of other kinds, or a mean of the wrong width.
    """

    neurons: NeuronSet
    means: Mapping[Site, Tensor] = field(default_factory=dict)
    name: str = "prune"

    def __post_init__(self):
        if not len(self.neurons):
            raise InputError("neurons: the set is empty; pruning nothing is no intervention")
        if others := {kind for _, kind in self.neurons.masks} - set(POOL):
            raise InputError(f"neurons: kinds {', '.join(sorted(others))} cannot be pruned; allowed: {', '.join(POOL)}")
        kept = {}
        for site, mask in self.neurons.masks.items():
            mean = torch.as_tensor(self.means.get(site, torch.zeros(mask.numel()))).detach().cpu().double()
            if mean.shape != mask.shape or not torch.isfinite(mean).all():
                raise InputError(f"means: {site} needs {mask.numel()} finite values, got {list(mean.shape)}")
            kept[site] = mean.masked_fill(~mask, 0)
        object.__setattr__(self, "means", kept)

    @classmethod
    def to_mean(cls, neurons: NeuronSet, statistics: Fluctuation, name: str = "prune to mean") -> Prune:
        """Replace each channel by its mean over the tokens that the statistics were taken from."""
        return cls(neurons, {site: statistics.mean(*site) for site in neurons.masks}, name)

    @property
    def key(self) -> str:
        digest = hashlib.sha256()
        for site, mean in self.means.items():
            digest.update(repr(site).encode() + mean.numpy().tobytes())
        return f"prune-{self.neurons.fingerprint}-{digest.hexdigest()[:12]}"

    def active(self, lm: LanguageModel) -> AbstractContextManager:
        _check(lm, self)
        return hooks.replace(
            lm.view, {site: (mask, self.means[site]) for site, mask in self.neurons.masks.items()}, self.name
        )


def _check(lm: LanguageModel, pruning: Prune) -> None:
    pruning.neurons.space.check("neurons: found on", lm.view.space)
    for site in pruning.neurons.masks:
        _ = lm.view.projection(*site).parameter  # an adapter layer is refused


# ------------------------------------------------------------------------------------------------------- export


def export(lm: LanguageModel, pruning: Prune, folder, *, smaller: bool = False) -> Path:
    """Write a checkpoint that plain transformers loads and that computes what the pruned model computes.

    Columns of pruned channels are zero and their constants stand in the biases of the output and down projections. With
    ``smaller`` FFN channels also go physically: a config holds one ``intermediate_size``, so each layer loses as many
    as the layer with the fewest pruned ones; the rest, and attention heads, stay as zeros.

    Returns the folder, which appears when it is complete.

    Raises:
        InputError: another architecture; an existing folder; means in a family whose projections have no bias (prune to
            zero there); or ``smaller`` with a layer in which no FFN channel, or every one, is pruned.
    """
    with new_folder(folder) as unfinished:
        pruned_model(lm, pruning, smaller=smaller).save_pretrained(unfinished)
        lm.tokenizer.save_pretrained(unfinished)
    return Path(folder)


def pruned_model(lm: LanguageModel, pruning: Prune, *, smaller: bool = False):
    """A pruned copy of the model, as :func:`export` writes it (same errors)."""
    _check(lm, pruning)
    check_plain(lm)
    drop = _dropped(lm.view, pruning.neurons) if smaller else {}
    config = copy.deepcopy(lm.model.config)
    flags = _bias_flags(lm.view, pruning)
    for flag in flags:
        setattr(config, flag, True)
    if drop:
        name = WIDTH.get(lm.view.family_name, "intermediate_size")
        setattr(config, name, lm.view.space.width((0, "ffn")) - len(drop[0]))
    state = {name: value.detach().clone() for name, value in lm.model.state_dict().items()}
    paths = {module: name for name, module in lm.model.named_modules()}
    for site in pruning.neurons.masks:
        projection = lm.view.projection(*site)
        _cut(state, paths[projection.module], projection, pruning.neurons.mask(site), pruning.means[site])
    for layer, index in drop.items():
        _remove(state, paths, lm.view, layer, index)
    model: Any = type(lm.model)(config)
    model = model.to(lm.model.dtype).eval()
    if flags:
        state = {name: torch.zeros_like(v) for name, v in model.state_dict().items() if name.endswith(".bias")} | state
    model.load_state_dict(state)
    model.generation_config = copy.deepcopy(lm.model.generation_config)
    return model


def _bias_flags(view: DecoderView, pruning: Prune) -> set[str]:
    """Config flags to set so that every projection that reads a mean has a bias."""
    found = set()
    for layer, kind in pruning.neurons.masks:
        if not pruning.means[layer, kind].any() or view.bias(layer, kind) is not None:
            continue
        flag = BIAS_FLAGS.get(view.family_name, {}).get(kind)
        if flag is None:
            raise InputError(
                f"means: family {view.family_name!r} has no bias after kind {kind}, so a checkpoint cannot hold the means; "
                "prune to zero to export, or keep the means as hooks"
            )
        found.add(flag)
    return found


def _cut(state: dict, path: str, projection: Projection, mask: Tensor, mean: Tensor) -> None:
    """Zero the columns of the mask; their constant goes into the bias."""
    name = f"{path}.weight"
    weight = state[name].t() if projection.transposed else state[name]
    mask = mask.to(weight.device)
    if mean.any():
        constant = weight.double() @ mean.to(weight.device)
        old = state.get(f"{path}.bias")
        state[f"{path}.bias"] = (constant if old is None else old.double() + constant).to(weight.dtype)
    weight[:, mask] = 0  # a view: the state's own tensor changes


def _dropped(view: DecoderView, neurons: NeuronSet) -> dict[int, Tensor]:
    """layer -> FFN channels that go physically, as many in each layer."""
    masks = [neurons.mask((layer, "ffn")) for layer in range(view.num_layers)]
    count, widths = min(int(m.sum()) for m in masks), {m.numel() for m in masks}
    if count == 0 or len(widths) > 1 or count == widths.pop():
        raise InputError(
            "smaller: needs some FFN channels pruned and some kept in every layer, for one intermediate_size holds for all "
            f"layers (pruned a layer: {', '.join(str(int(m.sum())) for m in masks)}); export with zeros instead"
        )
    return {layer: mask.nonzero().flatten()[:count] for layer, mask in enumerate(masks)}


def _remove(state: dict, paths: Mapping, view: DecoderView, layer: int, index: Tensor) -> None:
    """Take channels out of the down projection's columns and of the rows of gate and up."""
    width = view.space.width((layer, "ffn"))
    kept = torch.ones(width, dtype=torch.bool)
    kept[index] = False
    kept = kept.nonzero().flatten()
    down = view.projection(layer, "ffn")
    name = f"{paths[down.module]}.weight"
    state[name] = state[name].index_select(0 if down.transposed else 1, kept.to(state[name].device)).contiguous()
    modules: dict[nn.Module, tuple[bool, list[Tensor]]] = {}
    for role in ("gate", "up") if view.gated else ("up",):
        projection = view.projection(layer, role)
        start = projection.rows.start if isinstance(projection.rows, slice) else 0
        modules.setdefault(projection.module, (projection.transposed, []))[1].append(kept + start)
    for module, (transposed, rows) in modules.items():
        for leaf in ("weight", "bias"):
            key = f"{paths[module]}.{leaf}"
            if key in state:
                axis = 1 if transposed and leaf == "weight" else 0
                state[key] = state[key].index_select(axis, torch.cat(rows).to(state[key].device)).contiguous()
