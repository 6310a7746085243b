"""How the cost grows with prompt length, layers and width, with the formulas' expectation."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pandas as pd

from nt_utils.bench.setup import Shape, batch_of, forward, random_model, seconds
from nt_utils.models import DecoderView
from nt_utils.scoring.importance import Weights, score_batch
from nt_utils.scoring.query_key import ROWS

BASE = Shape(hidden=512, layers=2, heads=8, kv_heads=2, ffn=1376, batch=4, tokens=64)
SWEEPS = {
    "tokens": [{"tokens": t} for t in (16, 32, 64, 128, 256, 512)],
    "layers": [{"layers": n} for n in (1, 2, 4, 8)],
    "width": [{"hidden": 64 * h, "heads": h, "kv_heads": h // 4, "ffn": 172 * h} for h in (4, 8, 16, 24)],
}


def operations(shape: Shape) -> dict[str, float]:
    """Floating-point operations and softmax entries of one batch, from the formulas.

    Forward: two a weight and token, plus attention. Scores: for each query and key channel and each row of a causal
    row block, one softmax entry a key and head, and the norm in token space (keys x heads)^2 or head space.
    """
    d, g = shape.hidden // shape.heads, shape.heads // shape.kv_heads
    weights = shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * d + 3 * shape.ffn)
    plain = shape.batch * shape.tokens * (2 * weights + 4 * shape.hidden * shape.tokens / 2)
    entries = products = 0.0
    size = max(ROWS["cpu"], -(-shape.tokens // 16))
    for start in range(0, shape.tokens, size):
        stop = min(start + size, shape.tokens)
        for groups, heads in ((shape.heads, 1), (shape.kv_heads, g)):
            channels = groups * d * (stop - start)
            entries += channels * heads * stop
            products += 2 * channels * min((heads * stop) ** 2, heads * stop * d + (heads * d) ** 2)
    each = shape.batch * shape.layers
    return {"forward": shape.layers * plain, "products": each * products, "entries": each * entries}


def growth(repeats: int) -> pd.DataFrame:
    """One row a point: milliseconds of forward and exact scores, their ratio, and the expectation.

    Expectation: the forward's time, the norm's products at the forward's rate, and a time a softmax entry that is
    read off at the base shape alone.
    """
    rows = [_point(sweep, replace(BASE, **change), repeats) for sweep, points in SWEEPS.items() for change in points]
    base = _point("base", BASE, repeats)
    entry = max(base["exact_ms"] - base["forward_ms"] * (1 + base["products"] / base["forward"]), 0) / base["entries"]
    table = pd.DataFrame(rows)
    table["expected_ms"] = table.forward_ms * (1 + table.products / table.forward) + entry * table.entries
    table["ratio"] = table.exact_ms / table.forward_ms
    return table.drop(columns=["products", "forward", "entries"])


def _point(sweep: str, shape: Shape, repeats: int) -> dict:
    model, batch = random_model(shape), batch_of(shape)
    view = DecoderView(model)
    weights = Weights(view)
    functions = {
        "forward": forward(model, batch),
        "exact": lambda: score_batch(view, batch, weights=weights, exact_tokens=None),
    }
    times = {name: 1e3 * statistics.median(t) for name, t in seconds(functions, repeats).items()}
    return {
        "sweep": sweep,
        "tokens": shape.tokens,
        "layers": shape.layers,
        "width": shape.hidden,
        "forward_ms": times["forward"],
        "exact_ms": times["exact"],
        **operations(shape),
    }
