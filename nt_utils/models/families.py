"""What the project knows of each supported family: where its projections are, and how fused ones are laid out.

How to add a family
-------------------
1. Add one :class:`Family` entry to ``FAMILIES`` under the config's ``model_type``: the path of the layer list, the
   paths of the projections inside a layer, how fused projections are laid out (``FUSED``) and, if the attention
   normalises queries and keys, over what (``qk_norm="head"`` or ``"full"``). Nothing else names a family.
2. Add one tiny random config to ``tests/tiny.py`` (``CONFIGS``). Every parametrised test (reconstruction of fused
   weights, hooks, exact scores of every neuron against brute force, padding) then runs on it.
3. A fused layout that no family has yet needs one function in ``FUSED``; the test that rebuilds the fused weight
   with ``torch.equal`` covers it.

The attention must go through transformers' ``AttentionInterface``, use rotate-half rotary embeddings (whole head or
its first part) or none, and have one dense feed-forward block. Anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nt_utils.errors import ModelError

if TYPE_CHECKING:
    from nt_utils.models.view import DecoderView


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; paths are relative to the model (``layers``) or to one layer (the rest).

    ``qkv``: three paths, or one path of a fused projection whose layout ``fused`` names (a key of ``FUSED``).
    ``ffn_in``: the projections into the feed-forward's hidden channels (gate and up; one fused; or one plain).
    ``block_norms``: the norms behind the attention and behind the feed-forward block, where the family has them.
    ``gated``: whether a hidden channel has two rows in there (gate and up).
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    fused: str = ""
    o: str = "self_attn.o_proj"
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    down: str = "mlp.down_proj"
    qk_norm: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    block_norms: tuple[str, ...] = ()


BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm="head"),
    "gemma2": Family(block_norms=BEHIND),
    "gemma3_text": Family(qk_norm="head", block_norms=BEHIND),
    "olmo2": Family(qk_norm="full", block_norms=BEHIND),
    "granite": Family(),
    "phi3": Family(qkv=("self_attn.qkv_proj",), fused="in sequence", ffn_in=("mlp.gate_up_proj",)),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        attention="attention",
        qkv=("attention.query_key_value",),
        fused="by head",
        o="attention.dense",
        ffn_in=("mlp.dense_h_to_4h",),
        gated=False,
        down="mlp.dense_4h_to_h",
    ),
    "gpt2": Family(
        layers="transformer.h",
        attention="attn",
        qkv=("attn.c_attn",),
        fused="in sequence",
        o="attn.c_proj",
        ffn_in=("mlp.c_fc",),
        gated=False,
        down="mlp.c_proj",
    ),
}


def _rows_in_sequence(view: DecoderView) -> dict[str, slice | Tensor]:
    """All queries, then all keys, then all values (Phi-3, GPT-2)."""
    q, k = view.num_heads * view.head_dim, view.num_kv_heads * view.head_dim
    return {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + 2 * k)}


def _rows_by_head(view: DecoderView) -> dict[str, slice | Tensor]:
    """Query, key and value of the first head, then of the second, ... (GPT-NeoX)."""
    rows = torch.arange(3 * view.num_heads * view.head_dim).view(view.num_heads, 3, view.head_dim)
    return {name: rows[:, i].reshape(-1) for i, name in enumerate("qkv")}


FUSED: dict[str, Callable] = {"in sequence": _rows_in_sequence, "by head": _rows_by_head}


#: Which weights a neuron owns: kind -> (role of the projection, side); "input" = its row, "output" = its column.
OWNED = {
    "q": (("q", "input"),),
    "k": (("k", "input"),),
    "v": (("v", "input"),),
    "o": (("o", "output"),),
    "ffn": (("gate", "input"), ("up", "input"), ("ffn", "output")),
}


def check_family(config) -> Family:
    """The family's declaration. Raises ModelError naming the family and what it lacks."""
    name = getattr(config, "model_type", None) or type(config).__name__
    known = ", ".join(FAMILIES)
    if any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ModelError(
            f"model: family {name!r} has a mixture-of-experts feed-forward block, which is not supported; supported: {known}"
        )
    if name not in FAMILIES:
        raise ModelError(
            f"model: family {name!r} is not supported: it has no entry with the paths of its projections; supported: {known}"
        )
    if getattr(config, "quantization_config", None):
        raise ModelError("model: its weights are quantised; load an unquantised checkpoint")
    return FAMILIES[name]


def context_of(config) -> tuple[int | None, str]:
    """The longest sequence in tokens whose computation does not depend on the sequences beside it, and what sets it.

    That is the config's context (None for no limit); less where the rotary embedding of *all* prompts of a batch, and of
    all tokens in the cache, changes with the longest one (longrope, dynamic NTK): the length up to which it does not.
    """
    config = config.get_text_config()
    limit, why = getattr(config, "max_position_embeddings", None), "the model's context holds"
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # one, or one per kind of layer
        kind, outside = part.get("rope_type"), getattr(config, "original_max_position_embeddings", None)
        original = part.get("original_max_position_embeddings") or outside
        if kind in ("longrope", "dynamic") and original and (limit is None or original < limit):
            limit, why = original, f"with the model's {kind} rotary embedding results depend on the batch beyond"
    return limit, why
