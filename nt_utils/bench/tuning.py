"""One training step of SN-Tune against full training: ``python -m nt_utils.bench.tuning what`` runs one of them in its own process.

    sparse   a slice of the weights is trained (`Only`), gradients and optimiser state of that size
    dense    gradients of all weights, masked to the same neurons, and AdamW over all weights (the published way)
    full     ordinary fine-tuning: AdamW over all weights

A random Llama of 200 million parameters in float32, 1% of the pool chosen at random, one sequence of 64 tokens, on the
CPU. Peak memory counts the weights and everything above them, by the kernel's own mark.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from nt_utils.bench.memory import MALLOC
from nt_utils.bench.setup import Shape, batch_of, random_model, ratio, seconds
from nt_utils.experiments.cost import forget_peak, resident
from nt_utils.interventions.trainable import Only
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace

SHAPE = Shape(1024, 18, 16, 4, 2816, 1, 64)  # 203 million parameters
SHARE = 0.01


def chosen_neurons(space: NeuronSpace, share: float = SHARE) -> NeuronSet:
    """Random neurons of the pool."""
    order = torch.randperm(space.size(POOL), generator=torch.Generator().manual_seed(0))
    return NeuronSet.from_flat(space, order[: max(1, round(share * len(order)))], POOL)


def entry_masks(lm: LanguageModel, neurons: NeuronSet) -> dict[str, torch.Tensor]:
    """Parameter name -> which of its rows or columns are the neurons' (as a mask that multiplies the gradient)."""
    with Only(neurons).start(lm) as training:
        parts = training.delta().parts
    masks = {}
    for name, part in parts.items():
        parameter = lm.model.get_parameter(name)
        mask = torch.zeros(parameter.shape[part.axis])
        mask[part.index] = 1
        masks[name] = mask[:, None] if part.axis == 0 and parameter.ndim == 2 else mask
    return masks


def stepper(what: str, lm: LanguageModel, batch, share: float = SHARE) -> Callable[[], None]:
    """A function that makes one training step."""
    neurons = chosen_neurons(lm.view.space, share)
    masks = entry_masks(lm, neurons) if what == "dense" else {}
    training = Only(neurons).start(lm) if what == "sparse" else None
    parameters = training.parameters if training else list(lm.model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)

    def step() -> None:
        lm.model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss.backward()
        if what == "dense":
            for name, parameter in lm.model.named_parameters():
                parameter.grad.mul_(masks.get(name, 0))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    step.training = training  # its hooks live as long as it does

    return step


def sizes(lm: LanguageModel) -> dict:
    """The delta's file against the checkpoint's bytes, and the share of the parameters that is trained."""
    neurons = chosen_neurons(lm.view.space)
    delta = Only(neurons).start(lm).finish()
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        size = delta.save(Path(folder) / "delta.safetensors").stat().st_size
    return {"delta": size / weights, "share": neurons.share_of_parameters()}


def model_of(shape: Shape) -> LanguageModel:
    """A random model of a shape, ready to be trained."""
    lm = LanguageModel(random_model(shape), None, "random")
    lm.model.train()
    return lm


def peak(what: str, shape: Shape = SHAPE) -> dict:
    """Peak memory of the first step, weights included, and the bytes of the weights."""
    lm = model_of(shape)
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    found = sizes(lm) if what == "sparse" else {}
    step = stepper(what, lm, batch_of(shape))
    gc.collect()
    before = resident()
    forget_peak()
    step()
    return {"peak": weights + resident("VmHWM") - before, "weights": weights, **found}


def step_times(shape: Shape = SHAPE, repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of a step, in turn; the optimisers' states exist from the warm-up round on."""
    steps = {what: stepper(what, model_of(shape), batch_of(shape)) for what in ("sparse", "full")}
    return seconds(steps, repeats)


def measure(what: str) -> dict:
    """:func:`peak` in a fresh process whose freed memory goes back to the system at once."""
    command = [sys.executable, "-m", "nt_utils.bench.tuning", what]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tuning(repeats: int = 5) -> dict:
    """The rows of the table."""
    sparse, dense, full = (measure(what) for what in ("sparse", "dense", "full"))
    times = step_times(repeats=repeats)
    peaks = {"sparse": sparse["peak"], "dense": dense["peak"], "full": full["peak"], "weights": sparse["weights"]}
    return {
        "sn_memory_over_dense": sparse["peak"] / dense["peak"],
        "sn_step_over_full_step": ratio(times, "sparse", "full"),
        "sn_delta_over_checkpoint": sparse["delta"],
        "sn_delta_over_share": sparse["delta"] / sparse["share"],
        "sn_step_seconds": times,
        "sn_peak_mib": {what: value / 2**20 for what, value in peaks.items()},
    }


if __name__ == "__main__":
    print(json.dumps(peak(sys.argv[1])))
