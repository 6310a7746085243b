"""``make test-cpus``: the whole suite under every set of instructions that this CPU offers, with one and two threads."""

import os
import subprocess
import sys

import torch

ORDER = ["default", "avx2", "avx512"]


def capabilities() -> list[str]:
    """What ATEN_CPU_CAPABILITY can be here; elsewhere than on x86 only what there is."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    return ORDER[: ORDER.index(best) + 1] if best in ORDER else ["default"]


def main() -> int:
    """One line a run at the end; exit status 1 when a test failed in any."""
    lines, failed = [], False
    for capability in capabilities():
        for threads in ("1", "2"):
            environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": threads}
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *sys.argv[1:]], env=environment, stdout=subprocess.PIPE, text=True
            )
            print(done.stdout, flush=True)
            failed |= done.returncode != 0
            closing = (done.stdout.strip().splitlines() or ["no output"])[-1]
            lines.append(
                f"ATEN_CPU_CAPABILITY={capability} OMP_NUM_THREADS={threads}: exit {done.returncode}, {closing}"
            )
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
