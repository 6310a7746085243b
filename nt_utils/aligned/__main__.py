"""``python -m nt_utils.aligned gate|train``: measure the shipped alignment of SmolLM2-135M, or train one anew."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nt_utils import aligned, models
from nt_utils.errors import InputError, command
from nt_utils.interventions.export import write_lora


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m nt_utils.aligned", description="SmolLM2-135M, aligned here.")
    commands = parser.add_subparsers(dest="command", required=True)
    gate = commands.add_parser("gate", help="measure the shipped adapter on development and test prompts")
    train = commands.add_parser("train", help="train an adapter anew and measure it (about an hour on one core)")
    train.add_argument("--to", required=True, help="folder for the adapter; must not exist yet")
    for one in (gate, train):
        one.add_argument("--n", default=100, type=int, help="most prompts a set (default 100)")
    options = parser.parse_args(arguments)
    name = aligned.NAME
    if options.command == "train" and Path(options.to).exists():
        raise InputError(f"--to: {options.to} exists already; name a new folder")
    suites = {use: aligned.gate_suite(use, options.n) for use in ("develop", "test")}
    base = models.load(aligned.BASE, dtype="float32")
    if options.command == "train":
        name = str(Path(options.to).resolve())  # a bare name might be a model of the box or a shipped adapter
        delta = aligned.train(base)
        strength, tried = aligned.choose_strength(base, delta, suites["develop"])
        print(f"{tried.round(3).to_string(index=False)}\nstrength {strength:g} is taken")
        write_lora(base, aligned.at_strength(delta, strength), name)
    changed = models.load(name, dtype="float32")
    wrong = []
    for use, suite in suites.items():
        before, after = (aligned.answers(lm, suite) for lm in (base, changed))
        table = aligned.rates(before, after)
        print(f"{Path(name).name}, {use} prompts\n{table.round(3).to_string(index=False)}")
        wrong += aligned.missed(table) if use == "develop" else []
    print(f"gate missed on development prompts: {'; '.join(wrong)}" if wrong else "gate passed on development prompts")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
