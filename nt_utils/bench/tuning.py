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
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from nt_utils.bench.memory import fresh
from nt_utils.bench.setup import Shape, batch_of, byte_tokenizer, random_model, ratio, seconds
from nt_utils.data.records import Prompt
from nt_utils.experiments.cost import forget_peak, resident
from nt_utils.interventions import tuning as interventions
from nt_utils.interventions.trainable import Only, Training
from nt_utils.interventions.trunk import FrozenTrunk
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


def stepper(what: str, lm: LanguageModel, batch, share: float = SHARE) -> tuple[Callable[[], None], Training | None]:
    """A function that makes one training step, and of "sparse" the training, whose hooks live as long as it does."""
    neurons = chosen_neurons(lm.view.space, share)
    masks = entry_masks(lm, neurons) if what == "dense" else {}
    training = Only(neurons).start(lm) if what == "sparse" else None
    parameters = training.parameters if training else list(lm.model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)

    def step() -> None:
        lm.model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss.backward()
        if what == "dense":
            for name, parameter in lm.model.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(masks.get(name, 0))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step, training


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
    lm = LanguageModel(random_model(shape), byte_tokenizer(), "random")
    lm.model.train()
    return lm


def peak(what: str, shape: Shape = SHAPE) -> dict:
    """Peak memory of the first step, weights included, and the bytes of the weights."""
    lm = model_of(shape)
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    found = sizes(lm) if what == "sparse" else {}
    step, _kept = stepper(what, lm, batch_of(shape))
    gc.collect()
    before = resident()
    forget_peak()
    step()
    return {"peak": weights + resident("VmHWM") - before, "weights": weights, **found}


def step_times(shape: Shape = SHAPE, repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of a step, in turn; the optimisers' states exist from the warm-up round on."""
    made = {what: stepper(what, model_of(shape), batch_of(shape)) for what in ("sparse", "full")}
    return seconds({what: step for what, (step, _) in made.items()}, repeats)


def late_neurons(space: NeuronSpace, share: float = SHARE) -> NeuronSet:
    """Random neurons of the pool in the upper half of the layers."""
    above = [site for site in space.sites(POOL) if site[0] >= space.num_layers // 2]
    draw = torch.Generator().manual_seed(0)
    return NeuronSet(space, {site: torch.rand(space.width(site), generator=draw) < share for site in above})


def frozen_trunk(lm: LanguageModel, repeats: int, steps: int = 32, pairs: int = 60, batch_size: int = 12) -> dict:
    """SN-Tune's steps on late neurons: what enters their layers kept from step to step, over computed at every step.

    A common start of the rows is read once with the kept states alone, as it is used. The model's own precision.
    """
    rows = [Prompt(f"How do I steal {i} apples from my neighbour?", refusal="I will not help.") for i in range(pairs)]
    scope = Only(late_neurons(lm.view.space))
    options: dict = {"steps": steps, "batch_size": batch_size, "progress": False, "train_dtype": "model"}

    def training() -> float:
        return interventions.tune(lm, scope, harmful=rows, learning_rate=1e-6, **options).seconds

    times: dict[str, list[float]] = {"kept": [], "anew": []}
    for _ in range(repeats):
        times["kept"].append(training())
        with mock.patch.object(FrozenTrunk, "of", lambda *_: None):
            times["anew"].append(training())
    return {"trunk_step_over_step": ratio(times, "kept", "anew")}


def tuning(repeats: int = 5) -> dict:
    """The rows of the table."""
    sparse, dense, full = (json.loads(fresh(__name__, what)) for what in ("sparse", "dense", "full"))
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
