"""Where the time of exact scores goes: ``python -m nt_utils.bench.parts``.

Each row scores some projections alone, over the plain forward pass: in processor seconds of one thread, and in the
multiplications of matrix products, which are the least that any arrangement of the same formulas needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from nt_utils.bench.setup import SHAPES, Shape, batch_of, forward, random_model, ratio, seconds, set_clock
from nt_utils.errors import command
from nt_utils.models import DecoderView
from nt_utils.neurons import KINDS
from nt_utils.scoring.importance import Weights, score_batch

#: Two layers of Qwen2.5-Coder-0.5B: 14 query heads on 2 key-value heads.
REAL = {"qwen2.5-coder-0.5b": Shape(896, 2, 14, 2, 4864, 8, 64)}
PARTS = {"ffn": ("ffn",), "o": ("o",), "v": ("v",), "q": ("q",), "k": ("k",), "all": KINDS}


def parts_table(shapes: dict[str, Shape], repeats: int) -> pd.DataFrame:
    """Columns shape, part, time and multiplications (both over the forward pass's)."""
    rows = []
    for name, shape in shapes.items():
        view, batch = DecoderView(random_model(shape)), batch_of(shape)
        weights = Weights(view)
        work: dict[str, Callable[[], object]] = {"forward": forward(view.model, batch)}
        work |= {part: partial(score_batch, view, batch, kinds=k, weights=weights) for part, k in PARTS.items()}
        times, counted = seconds(work, repeats), {}
        for part, function in work.items():
            with FlopCounterMode(display=False) as counter:
                function()
            counted[part] = counter.get_total_flops()
        rows += [(name, part, ratio(times, part, "forward"), counted[part] / counted["forward"]) for part in PARTS]
    return pd.DataFrame(rows, columns=["shape", "part", "time", "multiplications"])


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    torch.set_num_threads(1)
    set_clock("cpu")
    print(parts_table(SHAPES | REAL, repeats=9).round(2).to_string(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
