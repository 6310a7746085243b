"""Nothing piles up: 200 cycles of scoring, modulation and generation leave memory, hooks, files and threads flat."""

import gc
import os
import threading
from pathlib import Path

import pytest
import torch

from nt_utils.data.records import Prompt
from nt_utils.evaluation.generation import generate
from nt_utils.interventions import Deactivate
from nt_utils.interventions.modulation import Modulation
from nt_utils.neurons import POOL, NeuronSet
from nt_utils.scoring.attribution import Case, attribution
from nt_utils.scoring.importance import importance
from tests.tiny import hooks_left, tiny_lm

CYCLES = 200
PROMPTS = ["Hello?", "A river."]

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


def resident():
    """Bytes of this process in main memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors():
    """How many tensors are alive, and their bytes."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(found), sum(x.numel() * x.element_size() for x in found)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_two_hundred_cycles_leave_nothing_behind(tmp_path):
    lm = tiny_lm()
    space = lm.view.space
    safety = NeuronSet.from_flat(space, range(0, 20, 2), POOL)
    utility = NeuronSet.from_flat(space, range(1, 20, 2), POOL)
    alpha = torch.linspace(0.5, 1.5, len(safety) + len(utility))
    settled = lm.model.config._attn_implementation

    def cycle(number):
        importance(lm, PROMPTS, kinds=("q", "o", "ffn"), path=tmp_path / "scores.safetensors", progress=False)
        if number % 10 == 0:  # the slowest step
            case = Case(Prompt("Hi."), Prompt("Well, hi."), "No.", "Yes.")
            attribution(lm, [case], method="patching", path=tmp_path / "a.safetensors", progress=False)
        modulation = Modulation(safety, utility, alpha, name=f"cycle {number}")
        for intervention in (modulation, Deactivate(safety))[: 2 if number % 10 == 0 else 1]:
            generate(lm, PROMPTS, max_new_tokens=2, intervention=intervention, progress=False)
        generate(lm, PROMPTS[:1], max_new_tokens=1, progress=False, cache=tmp_path / "cache")

    for number in range(20):  # lazy imports, allocator pools and caches settle
        cycle(number)
    before = tensors(), hooks_left(lm.model), open_files(), threading.active_count()
    memory = []
    for number in range(CYCLES):
        cycle(number)
        if number % 20 == 19:
            gc.collect()
            memory.append(resident())
    after = tensors(), hooks_left(lm.model), open_files(), threading.active_count()
    assert before[1] == 0
    assert after == before
    assert lm.model.config._attn_implementation == settled
    # The second half against the first: the allocator's own ups and downs are not growth.
    growth = min(memory[5:]) / min(memory[:5]) - 1
    print(
        f"tensors, hooks, files, threads: {after}; memory {memory[0] >> 20} -> {memory[-1] >> 20} MiB ({growth:+.2%})"
    )
    assert growth < 0.02
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "cache", "scores.safetensors"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_failing_cycles_leave_nothing_behind(tmp_path):
    """A model whose weights are NaN fails in the middle of every pass; hooks, files and attention are as before."""
    lm = tiny_lm()
    with torch.no_grad():
        lm.view.weight(1, "ffn")[0, 0] = torch.nan
    settled = lm.model.config._attn_implementation
    files = open_files()
    for _ in range(20):
        with pytest.raises(ValueError, match="NaN"):
            importance(lm, PROMPTS, kinds=("q", "o", "ffn"), path=tmp_path / "scores.safetensors", progress=False)
    assert hooks_left(lm.model) == 0
    assert open_files() == files
    assert lm.model.config._attn_implementation == settled
    assert list(tmp_path.iterdir()) == []
