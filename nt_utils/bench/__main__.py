"""Measure, print a table, write ``runs/bench.json`` (keys as in the table), ``runs/bench_growth.csv`` and its figure."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr

from nt_utils import plots
from nt_utils.bench import evaluation, memory, modulation, rivals, tuning
from nt_utils.bench.errors import error_table
from nt_utils.bench.growth import growth
from nt_utils.bench.setup import SHAPES, batch_of, forward, random_model, ratio, seconds, set_clock
from nt_utils.errors import InputError
from nt_utils.files import study_name
from nt_utils.models import DecoderView
from nt_utils.scoring.importance import Weights, score_batch

BARS = {
    "exact_over_forward.a": "<= 5",
    "exact_over_forward.b": "<= 5",
    "linear_over_forward.a": "<= 3",
    "linear_over_forward.b": "<= 3",
    "long_over_forward": "<= 6",
    "bfloat16_over_float32.forward": "none",
    "bfloat16_over_float32.generation": "none",
    "bfloat16_over_float32.scoring": "none",
    "peer_over_exact": ">= 15",
    "brute_over_exact": ">= 1500",
    "scoring_memory_over_forward.32": "<= 1.5",
    "scoring_memory_over_forward.512": "<= 1.5",
    "scoring_memory_512_over_32": "0.95 to 1.05",
    "sn_memory_over_dense": "<= 0.5",
    "sn_step_over_full_step": "<= 0.8",
    "sn_delta_over_share": "<= 1.1",
    "hooked_generation_over_plain": "<= 1.05",
    "folded_generation_over_plain": "<= 1.01",
    "attribution_over_backward": "<= 0.7",
    "patching_over_backward": "<= 2.5",
    "maml_second_over_first_order": "none",
    "evaluation_over_generate": "<= 1",
    "shared_prefix_over_none": "<= 0.5",
    "trunk_step_over_step": "<= 0.5",
}


def speed(repeats: int) -> dict:
    """Times of the exact scores, their linearised form and the rivals over the plain forward pass or each other."""
    results: dict = {"exact_over_forward": {}, "linear_over_forward": {}, "milliseconds": {}}
    for name, shape in SHAPES.items():
        view, batch = DecoderView(random_model(shape)), batch_of(shape)
        weights = Weights(view)

        def exact(view=view, batch=batch, weights=weights) -> None:
            score_batch(view, batch, weights=weights)

        def linear(exact=exact) -> None:
            with rivals.linearised():
                exact()

        times = seconds({"forward": forward(view.model, batch), "exact": exact, "linear": linear}, repeats)
        results["exact_over_forward"][name] = ratio(times, "exact", "forward")
        results["linear_over_forward"][name] = ratio(times, "linear", "forward")
        results["milliseconds"][name] = {key: [1e3 * t for t in values] for key, values in times.items()}
        if name == "b":
            results |= _rivals(view, batch, exact)
    return results


def long_prompt(repeats: int, tokens: int = 512) -> dict:
    """Scores of one long prompt, its q and k from sampled query rows, over the plain forward pass."""
    shape = replace(SHAPES["a"], layers=2, batch=1, tokens=tokens)
    view, batch = DecoderView(random_model(shape)), batch_of(shape)
    weights = Weights(view)
    functions = {"forward": forward(view.model, batch), "scores": lambda: score_batch(view, batch, weights=weights)}
    return {"long_over_forward": ratio(seconds(functions, repeats), "scores", "forward")}


def precision(repeats: int, shape=SHAPES["a"], new_tokens: int = 8) -> dict:
    """Times in bfloat16 over those in float32: the forward pass, greedy generation, exact scores."""
    functions: dict = {}
    for dtype in (torch.float32, torch.bfloat16):
        view, batch = DecoderView(random_model(shape).to(dtype)), batch_of(shape)
        weights = Weights(view)

        def generation(model=view.model, batch=batch) -> None:
            length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            model.generate(**batch.inputs, **length, do_sample=False, pad_token_id=0)

        def scoring(view=view, batch=batch, weights=weights) -> None:
            score_batch(view, batch, weights=weights)

        parts = {"forward": forward(view.model, batch), "generation": generation, "scoring": scoring}
        functions |= {f"{part} {dtype}": function for part, function in parts.items()}
    times = seconds(functions, repeats)
    return {"bfloat16_over_float32": {p: ratio(times, f"{p} torch.bfloat16", f"{p} torch.float32") for p in parts}}


def _rivals(view: DecoderView, batch, exact) -> dict:
    peer = seconds({"exact": exact, "peer": lambda: rivals.peer_scores(view, batch)}, 3)
    zeroed = rivals.zeroed_forwards(view, batch)
    brute = seconds({"exact": exact, "brute": lambda: [run() for run in zeroed]}, 3)
    return {
        "peer_over_exact": ratio(peer, "peer", "exact"),
        "brute_over_exact": ratio(brute, "brute", "exact") / len(zeroed) * view.space.size(),
    }


def linear_agreement(testbed: str | None) -> dict:
    """Spearman correlation of the linearised with the exact q and k scores, mean over layers and prompts."""
    view, batch = DecoderView(random_model(SHAPES["a"])), batch_of(SHAPES["a"])
    found = {"random": _agreement(view, batch)}
    if testbed:
        from nt_utils.models import load

        lm = load(testbed)
        texts = ["What is the capital of this land?", "Tell me how to do it.", "Please count to ten.", "Who are you?"]
        found["testbed"] = _agreement(lm.view, lm.encode(texts, side="right"))
    return found


def _agreement(view: DecoderView, batch) -> dict:
    exact = score_batch(view, batch, kinds=("q", "k"))
    with rivals.linearised():
        linear = score_batch(view, batch, kinds=("q", "k"))
    out = {}
    for kind in "qk":
        pairs = [
            (exact[i, kind][b], linear[i, kind][b]) for i in range(view.num_layers) for b in range(len(batch.lengths))
        ]
        out[kind] = float(torch.tensor([spearmanr(x, y).statistic for x, y in pairs]).mean())
    return out


def peak_memory(repeats: int = 1) -> dict:
    """Peak memory above the loaded weights over the plain forward's, at 32 and 512 prompts of shape (a)."""
    peaks = {
        (what, n): sorted(memory.measure(what, "a", n) for _ in range(repeats))[repeats // 2]
        for n in (32, 512)
        for what in ("forward", "exact")
    }
    return {
        "scoring_memory_over_forward": {str(n): peaks["exact", n] / peaks["forward", n] for n in (32, 512)},
        "scoring_memory_512_over_32": peaks["exact", 512] / peaks["exact", 32],
        "peak_mib": {f"{what}.{n}": value / 2**20 for (what, n), value in peaks.items()},
    }


def table(results: dict) -> str:
    """Measured values beside their bars."""
    lines = [f"{'measure':36}{'value':>10}  bar"]
    for key, bar in BARS.items():
        name, _, part = key.partition(".")
        value = results.get(name)
        value = value.get(part) if part and value is not None else value
        lines.append(f"{key:36}{'-' if value is None else format(value, '10.2f'):>10}  {bar}")
    return "\n".join(lines)


def _growth(options: argparse.Namespace) -> dict:
    grown = growth(max(3, options.repeats // 3))
    grown.to_csv(options.out / "bench_growth.csv", index=False, float_format="%.6g")
    plots.draw(options.out / "bench_growth.csv")
    return {"growth": grown.to_dict("records")}


def _errors(options: argparse.Namespace) -> dict:
    errors = error_table()
    errors.to_csv(options.out / "bench_errors.csv", index=False)
    print(errors.to_string(index=False, float_format="{:.1e}".format))
    return {"errors": errors.set_index("model").to_dict("index")}


#: Parts of the table: name -> (options) -> its rows.
PARTS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "speed": lambda o: speed(o.repeats) | long_prompt(max(3, o.repeats // 5)),
    "precision": lambda o: precision(o.repeats),
    "agreement": lambda o: {"linear_spearman": linear_agreement(o.testbed)},
    "memory": lambda o: peak_memory(),
    "modulation": lambda o: modulation.timings(o.repeats),
    "tuning": lambda o: tuning.tuning(max(3, o.repeats // 3)),
    "growth": _growth,
    "errors": _errors,
    "evaluation": lambda o: evaluation.rows(evaluation.model_of(o.model), max(1, o.repeats // 5)),
    "trunk": lambda o: tuning.frozen_trunk(evaluation.model_of(o.model), max(1, o.repeats // 5)),
}
#: Those that take any model.
OF_A_MODEL = ("evaluation", "trunk")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nt_utils.bench", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="models of 7B and 14B shape on a GPU instead")
    parser.add_argument("--layers", type=int, help="with --gpu: fewer layers, for a trial")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    words = "cpu: processor seconds, for busy machines"
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=words)
    parser.add_argument("--testbed", help="folder of a trained testbed, for the agreement of the linearised scores")
    words = f"folder, hub id or a model of the box, for {' and '.join(OF_A_MODEL)}, which alone are measured then"
    parser.add_argument("--model", default="", help=words)
    parser.add_argument("--only", choices=PARTS, help="one part")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure what was asked for, print it, and write bench.json (bench-NAME.json of a model that was named)."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        return _gpu(options) if options.gpu else _measure(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1


def _measure(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    set_clock(options.clock)
    if options.model and options.only not in (None, *OF_A_MODEL):
        raise InputError(f"model: got {options.model!r} with --only {options.only}; allowed: {', '.join(OF_A_MODEL)}")
    path = options.out / (f"bench-{study_name(options.model)}.json" if options.model else "bench.json")
    results = json.loads(path.read_text()) if options.only and path.is_file() else {}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "model": options.model or "random",
    }
    for name in [options.only] if options.only else OF_A_MODEL if options.model else PARTS:
        results |= PARTS[name](options)
        results.setdefault("machines", {})[name] = machine
    path.write_text(json.dumps(results, indent=1))
    print(table(results))
    print(f"agreement of the linearised scores (Spearman): {results.get('linear_spearman')}\nwritten: {path}")
    return 0


def _gpu(options: argparse.Namespace) -> int:
    from nt_utils.bench.gpu import gpu_table

    rows = gpu_table(options.layers)
    (options.out / "bench_gpu.json").write_text(json.dumps(rows, indent=1))
    for row in rows:
        print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
