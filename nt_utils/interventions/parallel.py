"""Training in several processes under accelerate: whole models side by side, or one model sharded over them (FSDP2).

    accelerator = parallel.join()                                # in every process that `accelerate launch` started
    lm = parallel.load("org/model", accelerator)                 # sharded where accelerate was told to use FSDP
    tuned = tune(lm, Only(safety), ..., accelerator=accelerator) # the same result in every process
    if accelerator.is_main_process:
        tuned.delta.save("delta.safetensors")                    # merge it into the model loaded plainly

`python -m nt_utils.study.tune` does this from the command line.

Every process takes its share of each batch; losses are weighted by response tokens and gradients averaged, so a step is
the one that a single process takes with the whole batch, up to rounding. FSDP shards the frozen weights, decoder block by
decoder block (`torch.distributed.fsdp.fully_shard`); the trained rows and columns, small as they are, lie whole in every
process. accelerate's own `prepare` wants to hand all parameters to FSDP and to reduce their gradients itself (and knows no
FSDP on CPUs), so the sharding is done here, by accelerate's settings; what of these settings cannot be honoured is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nt_utils import hooks, models
from nt_utils.errors import InputError, check_choice
from nt_utils.models import LanguageModel

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

#: What accelerate may be set to beside one process (names of its DistributedType).
_KNOWN = ("NO", "FSDP", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")


# ------------------------------------------------------------------------------------------------------ settings


def join() -> Accelerator:
    """The Accelerator of this process among those that `accelerate launch` started: on GPUs, else on the CPU.

    Raises:
        InputError: accelerate does not join the processes on this machine's devices, so each would train by itself.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"num_processes: got {launched}; allowed: 1, since accelerate joins none on {accelerator.device.type} devices"
        )
    return accelerator


def check(accelerator: Accelerator) -> bool:
    """Whether accelerate is set to FSDP.

    accelerate itself ignores FSDP on CPUs; its settings (the environment that `accelerate launch` makes) hold there too.

    Raises:
        InputError: a setting under which neurons cannot be trained exactly: DeepSpeed and others, mixed precision, gradient
            accumulation, FSDP version 1, or FSDP with offloading or with its own loading or checkpointing.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    check_choice("distributed_type", kind, _KNOWN)
    if accelerator.mixed_precision != "no":
        raise InputError(
            f"mixed_precision: got {accelerator.mixed_precision!r}; allowed: 'no' (masters are float32; the model computes "
            "in the dtype it is loaded in)"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"gradient_accumulation_steps: got {accelerator.gradient_accumulation_steps}; allowed: 1 (batch_size pairs are "
            "spread over the processes)"
        )
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
    if plugin is None:
        return False
    settings = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_offload_params": (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy", False),
        "fsdp_cpu_ram_efficient_loading": (bool(plugin.cpu_ram_efficient_loading), False),
        "fsdp_activation_checkpointing": (bool(plugin.activation_checkpointing), False),
        "fsdp_reshard_after_forward": (bool(plugin.reshard_after_forward), True),
    }
    for name, (found, allowed) in settings.items():
        if found != allowed:
            got, wanted = str(found).lower(), str(allowed).lower()
            raise InputError(f"{name}: got {got}; allowed: {wanted} (nt_utils/study/batch/profiles/fsdp.yaml)")
    return True


# ------------------------------------------------------------------------------------------------------ the model


def load(source, accelerator: Accelerator, **more) -> LanguageModel:
    """The model in every process: its shard where accelerate is set to FSDP, else whole, on the process's device.

    The processes take turns, so that the machine's memory holds one whole copy at a time. One process alone spreads the
    model over the devices that it sees (device_map "auto").

    Args:
        source: folder or hub id.
        more: as in :func:`nt_utils.models.load` (not device_map).

    Raises:
        InputError: see :func:`check`. ModelError: see :func:`nt_utils.models.load`.
    """
    fsdp = check(accelerator)
    if accelerator.num_processes == 1:
        return models.load(source, **more)
    models.check_source(source)
    # On an accelerator the checkpoint's dtype is kept, which a device map says; plainly on the CPU it may be widened.
    device_map = None if accelerator.device.type == "cpu" else {"": "cpu"}
    lm = None
    for turn in range(accelerator.num_processes):
        if turn == accelerator.local_process_index:
            lm = models.load(source, device_map=device_map, **more)
            if fsdp:
                shard(lm, accelerator)
            else:
                lm.model.to(accelerator.device)
        accelerator.wait_for_everyone()
    assert lm is not None, "every process has its turn"
    return lm


def shard(lm: LanguageModel, accelerator: Accelerator) -> None:
    """Shard the model's weights over all processes by FSDP2, block by block, in place and for good; freezes them.

    Every process must hold the same whole weights. From then on each holds its part on its device; a block's weights are
    gathered while it runs. `Only` can be trained (start it after this); plain forward passes work when all processes make
    them together; everything else wants the model loaded plainly.

    Raises:
        InputError: see :func:`check`; one process alone; a model that is sharded or spread over devices.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check(accelerator)
    if accelerator.num_processes < 2:
        raise InputError("accelerator: one process has nothing to shard over; allowed: 2 or more (accelerate launch)")
    if models.is_sharded(lm.model):
        raise InputError("model: it is sharded already")
    if len({parameter.device for parameter in lm.model.parameters()}) > 1:
        raise InputError("model: it is spread over devices; allowed: device_map=None or 'cpu'")
    assert lm.view.space.total_parameters, "the view reads whole weights: it is made before they are sharded"
    lm.model.requires_grad_(False)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    # Gathered and let go apart: each block, and the embedding, which can be as large as several of them.
    for unit in [*lm.view.layers, *([] if tied else [embedding])]:
        fully_shard(unit, mesh=mesh)
    fully_shard(lm.model, mesh=mesh)  # what is left: the last norm, the head, an embedding that is tied to it
    lm.weights_changed()


def held(model: nn.Module) -> tuple[int, int]:
    """Bytes of the model's weights that this process holds at rest, and bytes of all of them."""
    mine = whole = 0
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        mine += local.nbytes
        whole += parameter.nbytes
    return mine, whole


# ------------------------------------------------------------------------------------------------------ a step


def average(value: Tensor) -> None:
    """Replace a tensor by its mean over the processes, in place."""
    dist.all_reduce(value)
    value /= dist.get_world_size()


def _average_gradient(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None, "called when a gradient was accumulated"
    average(parameter.grad)


def averaged(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Inside, these parameters' gradients are averaged over all processes as soon as they are there.

    A gradient that is accumulated over several backward passes is averaged each time, which leaves its average unchanged.
    """
    return hooks.attached([hooks.after_gradient(p, _average_gradient) for p in parameters], must_run=False)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, lm: LanguageModel, accelerator: Accelerator | None) -> Processes:
        """The processes of an accelerator; this one alone without.

        Raises:
            InputError: see :func:`check`; a sharded model without its accelerator, or a whole one where accelerate is set to
                FSDP.
        """
        sharded = models.is_sharded(lm.model)
        if accelerator is None:
            if sharded:
                raise InputError(
                    "accelerator: the model is sharded over processes; give the Accelerator it is sharded with"
                )
            return cls()
        if check(accelerator) and not sharded and accelerator.num_processes > 1:
            raise InputError("model: accelerate is set to FSDP and the model is whole; load it with parallel.load")
        return cls(accelerator.process_index, accelerator.num_processes)

    def part(self, batch: Sequence[T]) -> Sequence[T]:
        """This process's share of a batch, which all of them have whole."""
        return batch[self.index :: self.count]

    def mean(self, value: Tensor) -> float:
        """A scalar's mean over the processes."""
        value = value.detach().clone()
        if self.count > 1:
            average(value)
        return float(value)
