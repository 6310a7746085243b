"""How long must an answer be? Verdicts on the first tokens of long answers of a real model.

    python -m nt_utils.bench.lengths --model qwen2.5-coder-0.5b-instruct --share 0.01

Answers of the largest length to harmful and to borderline requests (ASR and over-refusal), by the model untouched, with
its contrast neurons zeroed, and with the refusal direction ablated. One long answer serves all lengths. Judged by phrases.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nt_utils import models, selection
from nt_utils.bench import real
from nt_utils.data.records import PromptSet
from nt_utils.data.splits import Splits
from nt_utils.errors import command
from nt_utils.evaluation.generation import generate
from nt_utils.evaluation.lengths import LENGTHS, length_table, shortest, verdicts_by_length
from nt_utils.experiments.detection import top_of_pool
from nt_utils.interventions import Deactivate
from nt_utils.interventions.steering import refusal_direction
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL
from nt_utils.scoring.importance import importance


def conditions(lm: LanguageModel, splits: Splits, share: float, n: int, layers: int) -> dict[str, Any]:
    """Name -> intervention: none, ``share`` of the pool zeroed by contrast, the refusal direction ablated (where one is found).

    Neurons and direction are found with n prompts of each kind; the direction is chosen among so many ``layers`` at the
    last position.
    """
    harmful, benign = (splits.rows(role, "detect", n).texts for role in ("harmful", "benign"))
    first, second = (importance(lm, t, kinds=POOL, positions="last", progress=False) for t in (harmful, benign))
    chosen = top_of_pool(selection.contrast(first, second), share)
    others = [splits.rows(role, "develop", 32).texts for role in ("harmful", "benign")]
    direction = refusal_direction(lm, harmful, benign, (others[0], others[1]), layers=layers, positions=1).ablate
    name = f"contrast {100 * share:g}% zeroed"
    return {"untouched": None, name: Deactivate(chosen)} | ({direction.name: direction} if direction else {})


def answer_lengths(
    lm: LanguageModel,
    sets: Mapping[str, PromptSet],
    actions: Mapping[str, Any],
    lengths: Sequence[int] = LENGTHS,
    cache: bool | str | Path = True,
) -> pd.DataFrame:
    """A :func:`length_table` of every condition and set, one below the other."""
    tables = []
    for condition, action in actions.items():
        for name, prompts in sets.items():
            # One set after the other: what is answered stays in the cache when the run is broken off.
            answers = generate(
                lm, prompts, max_new_tokens=max(lengths), intervention=action, cache=cache, progress=False
            )
            verdicts = verdicts_by_length(lm, prompts, answers, lengths)
            tables.append(length_table(verdicts, condition=condition, set=name))
            print(tables[-1].to_string(index=False, float_format="{:.3f}".format), flush=True)
    return pd.concat(tables, ignore_index=True)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Write lengths_MODEL.csv and .md, and say which length is enough."""
    parser = real.parser("nt_utils.bench.lengths", __doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--n", type=int, default=32, help="prompts of a set")
    parser.add_argument("--n-detect", type=int, default=60, help="prompts of a kind to find neurons and direction with")
    parser.add_argument("--share", type=float, default=0.01, help="share of the pool that is zeroed")
    parser.add_argument("--layers", type=int, default=6, help="layers that the direction is chosen from")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    options = parser.parse_args(arguments)
    splits = real.splits(options)
    sets = {role: splits.rows(role, "test", options.n) for role in ("harmful", "borderline")}
    lm = models.load(options.model, dtype=options.dtype)
    actions = conditions(lm, splits, options.share, options.n_detect, options.layers)
    table = answer_lengths(lm, sets, actions, options.lengths)
    for condition, part in table.groupby("condition", sort=False):
        said = " and ".join(f"{shortest(part, on)} on {on}" for on in ("compliance", "refusal"))
        print(f"{condition}: tokens from which on 95% agree in both sets: {said}")
    real.write(table, "lengths", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
