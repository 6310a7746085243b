"""float32 against bfloat16 on a real model: seconds, scores, sets of neurons, answers and rates.

python -m nt_utils.bench.dtypes --model qwen2.5-coder-0.5b-instruct
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from nt_utils import models, selection
from nt_utils.bench import real
from nt_utils.bench.setup import forward, ratio, seconds, set_clock
from nt_utils.data.records import PromptSet
from nt_utils.errors import command
from nt_utils.evaluation.generation import generate
from nt_utils.evaluation.suite import Evaluation, Suite, evaluate, make_suite
from nt_utils.experiments.detection import top_of_pool
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL
from nt_utils.scoring.importance import Weights, importance, score_batch

DTYPES = ("float32", "bfloat16")
COLUMNS = ("measure", *DTYPES, "between", "n")
SHARES = (0.001, 0.01)


def speed(lms: Mapping[str, LanguageModel], prompts: Sequence[str], repeats: int, tokens: int = 24) -> Iterable[tuple]:
    """Seconds of a forward pass over the prompts, of answers of so many tokens, and of the exact scores; between: their ratio."""
    functions: dict[str, Callable[[], object]] = {}
    for dtype, lm in lms.items():
        batch, weights = lm.encode(list(prompts), side="right").to(lm.device), Weights(lm.view)
        functions[f"forward {dtype}"] = forward(lm.model, batch)
        functions[f"answers {dtype}"] = partial(generate, lm, prompts, max_new_tokens=tokens, progress=False)
        functions[f"scoring {dtype}"] = partial(score_batch, lm.view, batch, weights=weights)
    times = seconds(functions, repeats)
    middle = {name: float(np.median(values)) for name, values in times.items()}
    for part in ("forward", "answers", "scoring"):
        names = [f"{part} {dtype}" for dtype in DTYPES]
        yield f"{part}, seconds", *(middle[name] for name in names), ratio(times, names[1], names[0]), len(prompts)


def scores(lms: Mapping[str, LanguageModel], harmful: PromptSet, benign: PromptSet) -> Iterable[tuple]:
    """How far the scores of the pool differ at the last positions, and the sets chosen from them."""
    found = {
        dtype: [importance(lm, part.texts, kinds=POOL, positions="last", progress=False) for part in (harmful, benign)]
        for dtype, lm in lms.items()
    }
    first, second = ([s.matrix(POOL).double().numpy() for s in found[dtype]] for dtype in DTYPES)
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    apart = np.concatenate([np.abs(a - b)[a > 0] / a[a > 0] for a, b in pairs])
    n, nothing = len(pairs), (math.nan, math.nan)
    yield "scores, relative difference, median", *nothing, float(np.median(apart)), n
    yield "scores, relative difference, 95th percentile", *nothing, float(np.quantile(apart, 0.95)), n
    agreement = float(np.mean([spearmanr(a, b).statistic for a, b in pairs]))
    yield "scores, Spearman, mean of prompts", *nothing, agreement, n
    rules = {"contrast": selection.contrast, "mean importance": lambda harmful, _: selection.mean_importance(harmful)}
    for rule, chosen in rules.items():
        rankings = [chosen(*found[dtype]) for dtype in DTYPES]
        for share in SHARES:
            sets = [top_of_pool(ranking, share) for ranking in rankings]
            yield f"{rule}, top {100 * share:g}% of the pool, Jaccard", *nothing, sets[0].jaccard(sets[1]), len(sets[0])


def rates(lms: Mapping[str, LanguageModel], suite: Suite) -> Iterable[tuple]:
    """Rates of a suite, the share of its verdicts that agree, and of its answers that are equal."""
    first, second = (evaluate(lms[dtype], suite, progress=False) for dtype in DTYPES)
    for member in suite.sets:
        metric = member.metrics[0]
        before, after = (found.rate(member.name, metric) for found in (first, second))
        yield f"{member.name}, {metric}", before.value, after.value, after.value - before.value, before.n
        for column, words in (("verdict", "verdicts that agree"), ("response", "answers that are equal")):
            same = _column(first, member.name, column) == _column(second, member.name, column)
            yield f"{member.name}, {words}", math.nan, math.nan, float(same.mean()), len(same)


def _column(found: Evaluation, name: str, column: str) -> np.ndarray:
    return found.rows.loc[found.rows["set"] == name, column].to_numpy(str)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Write dtypes_MODEL.csv and .md."""
    parser = real.parser("nt_utils.bench.dtypes", __doc__)
    parser.add_argument("--n", type=int, default=40, help="prompts of a set that are answered")
    parser.add_argument("--n-detect", type=int, default=32, help="prompts of a kind that are scored")
    parser.add_argument("--n-timed", type=int, default=8, help="prompts that are timed")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor seconds, for busy machines"
    )
    options = parser.parse_args(arguments)
    set_clock(options.clock)
    splits = real.splits(options)
    harmful, benign = (splits.rows(role, "detect", options.n_detect) for role in ("harmful", "benign"))
    asked, borderline = (splits.rows(role, "test", options.n) for role in ("harmful", "borderline"))
    suite = make_suite(harmful=asked, borderline=borderline, max_new_tokens=options.tokens)
    lms = {dtype: models.load(options.model, dtype=dtype) for dtype in DTYPES}
    lines: list[tuple] = []
    timed = speed(lms, harmful.texts[: options.n_timed], options.repeats, options.tokens)
    for line in itertools.chain(timed, scores(lms, harmful, benign), rates(lms, suite)):
        lines.append(line)
        print(*line, flush=True)
    real.write(pd.DataFrame(lines, columns=list(COLUMNS)), "dtypes", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
