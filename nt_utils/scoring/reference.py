"""What importance is, word for word: zero a neuron, run its block again, take the norm of the change [SN, Eq. 1].

    Imp(N|c) = || h_without_N(c) - h(c) ||_2,    h = the output of the attention or feed-forward block that holds N.

One pass of the block for every neuron: slow, on any model, with nothing to trust but the model itself. It is the oracle of the
tests; :mod:`nt_utils.scoring.importance` computes the same numbers for all neurons in one pass of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nt_utils import hooks
from nt_utils.models import DecoderView


@contextmanager
def zeroed(view: DecoderView, layer: int, kind: str, index: int) -> Iterator[None]:
    """The neuron's weights, and for q, k and v its bias, are 0 inside."""
    projection = view.projection(layer, kind)
    weight, bias = projection.parameter, getattr(projection.module, "bias", None)
    stored = weight.t() if projection.transposed else weight  # [outputs, inputs]
    if kind in ("o", "ffn"):
        entries = [stored[:, index]]
    else:
        outputs = torch.arange(len(stored))
        row = int(outputs[slice(None) if projection.rows is None else projection.rows][index])
        entries = [stored[row], *([] if bias is None else [bias[row]])]
    before = [entry.clone() for entry in entries]
    try:
        for entry in entries:
            entry.zero_()
        yield
    finally:
        for entry, values in zip(entries, before, strict=True):
            entry.copy_(values)


@torch.no_grad()
def importance_by_hand(
    view: DecoderView,
    ids: Int[Tensor, "1 tokens"],
    layer: int,
    kind: str,
    neurons: Sequence[int] | None = None,
    last: int | None = None,
) -> Float[Tensor, " neurons"]:
    """Importance of some neurons of a projection (None: all) on one prompt; ``last``: over its last so many tokens."""
    block = view.feed_forward(layer) if kind == "ffn" else view.attention(layer)
    call: dict = {}
    with hooks.observe([(block, lambda args, kwargs: call.update(args=args, kwargs=kwargs))]):
        view.model(ids.to(view.model.device), use_cache=False)

    def output() -> Float[Tensor, "tokens hidden"]:
        found = block(*call["args"], **call["kwargs"])
        return (found[0] if isinstance(found, tuple) else found)[0, -(last or 0) :]

    plain, changes = output(), []
    for index in range(view.space.width((layer, kind))) if neurons is None else neurons:
        with zeroed(view, layer, kind, index):
            changes.append((output() - plain).double().norm())
    return torch.stack(changes)
