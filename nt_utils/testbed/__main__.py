"""``python -m nt_utils.testbed gates|train|ship``: show the shipped testbeds, train one anew, put it into the package."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nt_utils.errors import InputError, command
from nt_utils.testbed import BARS, RECIPES, STAGES, Testbed, build, ship, shipped


def gate_table(gates: Mapping[str, Mapping], split: str) -> str:
    """One line a rate with a bar: the rate of each gate in percent, and what is wanted."""
    lines = ["".join([f"{split + ' split':50}", *(f"{name:>18}" for name in gates), "            wanted"])]
    for bar in BARS:
        rates = [{row["name"]: row["rate"] for row in gate[split]}[bar.name] for gate in gates.values()]
        wanted = f"{100 * bar.low:.0f} to {100 * bar.high:.0f}%"
        lines.append("".join([f"{bar.name:50}", *(f"{100 * rate:17.1f}%" for rate in rates), f"{wanted:>18}"]))
    return "\n".join(lines)


def _compare(made: Testbed, seed: int, size: str) -> None:
    print(f"{made.folder}: fingerprint {made.fingerprint}, {made.seconds:.0f} s")
    print(f"to study it: model: {made.aligned}, base_model: {made.unaligned}")
    if not made.gate["measured"]:
        return
    gates, known = {"trained here": made.gate}, shipped()["seeds"].get(str(seed))
    if known and size == "default":
        same = "the same weights as" if known["fingerprint"] == made.fingerprint else "another model than"
        print(f"{same} the shipped one ({known['fingerprint']})")
        gates["shipped"] = known["gate"]
    for split in ("dev", "test"):
        print(gate_table(gates, split))
    print("gate passed" if made.gate["passed"] else f"gate missed: {'; '.join(made.gate['missed'])}")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m nt_utils.testbed", description="The testbed and its gate.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("gates", help="gates and fingerprints of the shipped testbeds")
    for name, text in (("train", "train one anew, into the cache"), ("ship", "put a trained one into the package")):
        one = commands.add_parser(name, help=text)
        one.add_argument("--seed", required=True, type=int)
        one.add_argument("--size", default="default", choices=[size for size in RECIPES if size != "micro"])
    options = parser.parse_args(arguments)
    if options.command == "gates":
        seeds = shipped()["seeds"]
        for split in ("dev", "test"):
            print(gate_table({f"seed {seed}": record["gate"] for seed, record in seeds.items()}, split))
        for seed, record in seeds.items():
            missed = record["gate"]["missed"]
            verdict = f"missed: {'; '.join(missed)}" if missed else "passed"
            print(f"seed {seed}: fingerprint {record['fingerprint']}, gate {verdict}")
        return 0
    if options.command == "ship" and options.size != "default":
        raise InputError(f"size: got {options.size}; only the default size is shipped")
    made = build(options.seed, options.size, retrain=True)
    if options.command == "ship":
        models = {stage: LlamaForCausalLM.from_pretrained(made.folder / stage) for stage in STAGES}
        ship(options.seed, models, PreTrainedTokenizerFast.from_pretrained(made.aligned), made.seconds)
    _compare(made, options.seed, options.size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
