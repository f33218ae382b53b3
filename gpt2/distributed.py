"""Ranks and devices: joining the processes that torchrun starts, wrapping the model, and agreeing
on numbers.

Without torchrun everything here is the identity. The global batch is cut over the ranks and
gradients are averaged, so that any number of processes computes the same step up to rounding.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lib.config import Device, Parallel
from lib.errors import InputError


def is_main() -> bool:
    """Say whether this is the process that prints and writes files."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str) -> None:
    """Print one line of progress on stderr, from the main process only."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def show_progress() -> bool:
    """Say whether progress bars make sense: on a terminal, in the main process."""
    return is_main() and sys.stderr.isatty()


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among all of them, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    def rows(self, num_rows: int) -> slice:
        """Return this rank's share of a batch whose rows the number of processes divides."""
        share = num_rows // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def total(self, values: Sequence[float | Tensor]) -> list[float]:
        """Add scalars up over all ranks; every rank must call it, and all get the same numbers."""
        vector = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in values]
        )
        if self.size > 1:
            dist.all_reduce(vector)
        return [float(value) for value in vector.tolist()]

    def add(self, tensor: Tensor) -> Tensor:
        """Return a tensor's sum over all ranks, without gradients; every rank must call it."""
        total = tensor.detach().clone().to(self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()


def start_world(device: Device) -> World:
    """Join the processes of torchrun, if there are any; raises InputError for a device that
    isn't there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "RUN_DEVICE_CUDA=y but torch sees no CUDA device: choose RUN_DEVICE_AUTO or "
            "RUN_DEVICE_CPU"
        )
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU, there are "
            f"{torch.cuda.device_count()}: lower --nproc-per-node"
        )
    place = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        dist.init_process_group(
            "nccl" if use_cuda else "gloo", device_id=place if use_cuda else None
        )
    return World(rank=int(os.environ.get("RANK", "0")), size=size, device=place)


def stop_world() -> None:
    """Leave the group of processes, if one was joined."""
    if dist.is_initialized():
        # Gloo's threads need the GIL to drop the tensors of the last collective, and its destructor
        # joins them while it holds the GIL: without a moment for them this deadlocks now and then.
        time.sleep(0.2)
        dist.destroy_process_group()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 on GPUs that compute in it, else None: full float32."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None


def wrap_model(model: Any, world: World, *, parallel: Parallel, compiled: bool) -> Any:
    """Move the model to the device and make its gradients those of the global batch; returns what
    is to be called.

    DDP wraps; FSDP2 shards the parameters of each layer, and the rest as one group, in place. The
    optimizer must be made after it.
    """
    model.to(world.device)
    if world.size == 1:
        if parallel == "fsdp2":
            log("TRAIN_FSDP2 has no effect on a single process: start it with torchrun to shard")
        if compiled:
            model.compile()
        return model
    if parallel == "fsdp2":
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=autocast_dtype(world.device), reduce_dtype=torch.float32
        )
        gpt2 = model.config.model_type == "gpt2"
        for layer in model.transformer.h if gpt2 else model.model.layers:
            if compiled:
                layer.compile()
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model
    if compiled:
        model.compile()
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def gradient_sync(model: Any, *, last: bool) -> AbstractContextManager[None]:
    """Return a context for one pass of an accumulated step: ranks exchange gradients only in the
    last one.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, a scalar; collective under FSDP2."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def like_parameter(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Bring a whole tensor that every rank holds onto the parameter's device, sharded as the
    parameter is.
    """
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(
            tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return tensor
