"""Peak memory of one way of going through N prompts, in a process of its own: ``python -m nt_utils.bench.memory what shape N``.

Counted is the process's highest resident memory, by the kernel's own mark, above what it holds once the model is loaded
and has run once. The score file is written, not mapped, so its pages are the system's and are not counted. Freed blocks go back to the system at once (malloc's thresholds are set by
the caller), so that the peak is what was needed, not what was kept.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nt_utils.experiments.cost import forget_peak, resident

#: Freed memory goes back to the system at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure(what: str, shape: str, prompts: int) -> int:
    """Peak bytes above the loaded model, from a fresh process."""
    return int(fresh("nt_utils.bench.memory", what, shape, prompts))


def fresh(module: str, *arguments: object) -> str:
    """The last line that a module prints in a process of its own, whose freed memory goes back to the system at once."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def _main(what: str, name: str, prompts: int) -> int:
    from nt_utils.bench.setup import SHAPES, RandomPrompts, byte_tokenizer, forward, random_model
    from nt_utils.scoring.importance import importance

    shape = SHAPES[name]
    lm = RandomPrompts(random_model(shape), byte_tokenizer(), "random")
    lm.tokens_a_prompt = shape.tokens
    numbers = [str(i) for i in range(prompts)]
    with tempfile.TemporaryDirectory() as folder:

        def run(some: list[str]) -> None:
            if what == "exact":
                path = Path(folder) / "scores.safetensors"
                importance(lm, some, batch_size=shape.batch, path=path, progress=False)
            else:
                for start in range(0, len(some), shape.batch):
                    forward(lm.model, lm.encode(some[start : start + shape.batch], side="right"))()

        run(numbers[: shape.batch])  # threads, caches and libraries are set up
        gc.collect()
        before = resident()
        forget_peak()
        run(numbers)
        return resident("VmHWM") - before


if __name__ == "__main__":
    print(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
