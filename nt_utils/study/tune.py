"""SN-Tune from the command line, in one process or in several under accelerate: trains the neurons of a file.

``accelerate launch --config_file nt_utils/study/batch/profiles/fsdp.yaml -m nt_utils.study.tune --model org/model --neurons safety.safetensors
--output delta.safetensors`` shards the model over the machine's GPUs; ``python -m nt_utils.study.tune`` does the same in one
process. Defaults are [SN]'s section 4: 50 pairs, one epoch, learning rate 1e-6, length 512.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nt_utils.errors import command

if TYPE_CHECKING:
    from nt_utils.data.records import PromptSet
    from nt_utils.neurons import NeuronSet

EMBEDDED = "testbed"  # the embedded prompts, as in a notebook's parameters


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, read."""
    parser = argparse.ArgumentParser(
        prog="python -m nt_utils.study.tune", description="Train chosen neurons on refusals."
    )
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--dtype", default="auto", help="of the weights, as in models.load")
    parser.add_argument("--neurons", required=True, help="file of the neurons to train")
    parser.add_argument("--minus", default="", help="file of (foundation) neurons that are not trained: RSN-Tune")
    parser.add_argument("--sides", default="both", help="input, output or both")
    parser.add_argument("--harmful", default=EMBEDDED, help="prompt source, as in a notebook's parameters")
    parser.add_argument("--benign", default="", help="prompt source with answers to mix in; '' = none")
    parser.add_argument("--pairs", type=int, default=50, help="harmful prompts, and as many benign ones")
    parser.add_argument("--refusal", default="I'm sorry, but I can't help with that.", help="where a prompt has none")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=None, help="default: one pass over the pairs")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step, over all processes")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="file for the delta (safetensors)")
    parser.add_argument("--merged", default="", help="folder for the merged checkpoint, an ordinary one")
    return parser.parse_args(arguments)


def prompts(options: argparse.Namespace) -> tuple[PromptSet, PromptSet | tuple[()]]:
    """Harmful prompts with their refusals, benign ones with their answers."""
    from nt_utils.data import corpus, sources

    def read(kind: str) -> PromptSet:
        source = getattr(options, kind)
        if source == EMBEDDED:
            return corpus.pairs(options.pairs, seed=options.seed)[kind == "benign"]
        return sources.load_prompts(source, limit=options.pairs, seed=options.seed, kind=kind)

    harmful = read("harmful").map(lambda p: p if p.refusal else p.replace(refusal=options.refusal))
    return harmful, read("benign") if options.benign else ()


def _neurons(options: argparse.Namespace) -> NeuronSet:
    from nt_utils.neurons import NeuronSet

    chosen = NeuronSet.load(options.neurons)
    return chosen - NeuronSet.load(options.minus) if options.minus else chosen


def run(options: argparse.Namespace) -> None:
    """Load, train and save; in every process that accelerate started, the first of which writes and prints."""
    from nt_utils.interventions import parallel
    from nt_utils.interventions.tuning import Only, tune

    accelerator = parallel.join()
    harmful, benign = prompts(options)
    scope = Only(_neurons(options), sides=options.sides, name="rsn-tune" if options.minus else "sn-tune")
    epoch = -(-(len(harmful) + len(benign)) // max(options.batch_size, 1))
    lm = parallel.load(options.model, accelerator, dtype=options.dtype)
    dtype = next(lm.model.parameters()).dtype
    mine, whole = parallel.held(lm.model)
    same = ("learning_rate", "batch_size", "max_length", "seed", "gradient_checkpointing")
    given = {name: getattr(options, name) for name in same}
    steps = epoch if options.steps is None else options.steps
    tuned = tune(lm, scope, harmful=harmful, benign=benign, steps=steps, accelerator=accelerator, **given)
    accelerator.end_training()  # nobody waits for the first process, whose merging takes minutes for a large model
    if accelerator.is_main_process:
        path = tuned.delta.save(options.output)
        print(f"{tuned.trained} parameters trained ({100 * tuned.share:.3f}% of the model), {len(tuned.losses)} steps")
        print(f"loss {tuned.losses[0]:.4f} -> {tuned.losses[-1]:.4f} nats a response token")
        share = f"{100 * mine / whole:.1f}% of {whole / 2**30:.3g} GiB"
        print(f"weights in this process, one of {accelerator.num_processes}: {share}")
        print(f"delta: {path}, {100 * tuned.delta.moved_share:.1f}% of its entries moved")
        if options.merged:
            print(f"merged checkpoint: {_merge(options, dtype)}")


def _merge(options: argparse.Namespace, dtype) -> Path:
    """The delta in the model, loaded plainly on the CPU, as an ordinary checkpoint."""
    from nt_utils import models
    from nt_utils.interventions.delta import Delta

    lm = models.load(options.model, dtype=dtype, device_map=None)
    with Delta.load(options.output, lm).active(lm):
        lm.model.save_pretrained(options.merged)
    lm.tokenizer.save_pretrained(options.merged)
    return Path(options.merged)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m nt_utils.study.tune`` and ``accelerate launch ... -m nt_utils.study.tune``."""
    run(read_options(arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
