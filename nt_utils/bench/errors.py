"""Largest relative error of the scores against the definition: every family, projection and neuron of tiny models."""

from __future__ import annotations

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nt_utils.models import FAMILIES, DecoderView, pad
from nt_utils.scoring.importance import score_batch
from nt_utils.scoring.reference import importance_by_hand

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def error_table(families=tuple(FAMILIES), tokens: int = 12) -> pd.DataFrame:
    """One row a family: the largest relative error per projection, float32, over all neurons of one prompt.

    Errors are relative to the neuron's importance, or to a thousandth of its projection's largest where that is more.
    """
    torch.manual_seed(0)
    rows = []
    for name in families:
        known = {key: value for key, value in SHAPE.items() if hasattr(AutoConfig.for_model(name), key)}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **known)).eval()
        for parameter in model.parameters():  # of normal size, so that no neuron's effect is vacuous
            parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
        view, ids = DecoderView(model), torch.randint(3, 64, (1, tokens))
        found = score_batch(view, pad(ids.tolist(), pad_id=0, side="right", prompt_lengths=[tokens]))
        worst: dict[str, float] = {}
        for (layer, kind), scores in found.items():
            wanted = importance_by_hand(view, ids, layer, kind)
            worst[kind] = max(
                worst.get(kind, 0.0), float(((scores[0] - wanted).abs() / wanted.clamp(min=1e-3 * wanted.max())).max())
            )
        rows.append({"model": name, **worst})
    return pd.DataFrame(rows)
