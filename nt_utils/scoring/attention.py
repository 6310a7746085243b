"""Reading queries, keys, values and masks: the model's attention runs through a function of ours for the time of a pass.

They come from the model itself, by transformers' AttentionInterface, so that scaling, soft-capping, windows and rotary
embeddings are its own, whichever implementation (eager, sdpa, flash) it otherwise uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from nt_utils.errors import ModelError
from nt_utils.models import DecoderView

_INTERFACE = "nt_utils_scoring"
_functions: list[Callable] = []


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_ignored):
    """What transformers calls in place of eager or sdpa attention."""
    if not _functions:
        raise RuntimeError("the scoring attention was called outside of scoring")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _functions[-1](module, query, key, value, attention_mask, scaling, softcap), None


def _mask(*args, **more) -> Tensor | None:
    """The model's own mask (causal, window, padding) as bool [batch, 1, queries, keys], never skipped."""
    return sdpa_mask(*args, **more | {"allow_is_causal_skip": False})


@contextmanager
def attention_through(view: DecoderView, function: Callable) -> Iterator[None]:
    """Compute every attention by ``function(layer, query, key, value, mask, scaling, softcap)``; restored on exit.

    Args:
        function: gets query [batch, H, tokens, d], key and value [batch, Hkv, tokens, d] as the attention sees them (after
            norms and rotary embedding), mask bool [batch, 1, tokens, tokens]; returns [batch, tokens, H, d].

    Raises:
        ModelError: the attention of some layer did not go through the interface.
    """
    AttentionInterface.register(_INTERFACE, _attention)
    AttentionMaskInterface.register(_INTERFACE, _mask)
    layer_of = {id(view.attention(i)): i for i in range(view.num_layers)}
    called = set()

    def by_layer(module, *args):
        layer = layer_of[id(module)]
        called.add(layer)
        return function(layer, *args)

    configs: dict[int, Any] = {id(m.config): m.config for m in view.model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    _functions.append(by_layer)
    try:
        for config in configs.values():
            config._attn_implementation_internal = _INTERFACE
        yield
        if len(called) != view.num_layers:
            raise ModelError(
                f"model: the attention of family {view.family_name!r} does not go through transformers' "
                "AttentionInterface, so its queries and keys cannot be read"
            )
    finally:
        _functions.pop()
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
