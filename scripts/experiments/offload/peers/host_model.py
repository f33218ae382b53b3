"""A model in host memory that computes on a GPU: what the systems of that benchmark share.

The device's memory is limited for everybody alike (meters.py), so that no system's own limit needs
to be trusted. With the device "cpu" the systems run, too, without streams: that is for tests of the
calls.
"""

from typing import Any

from scripts.experiments.offload.peers.base import Task


def load_on_host(task: Task) -> Any:
    """Load the whole model into host memory, out of the mapped file."""
    from transformers import AutoModelForCausalLM

    from lib.checkpoint.models import own_memory

    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype="auto")
    own_memory(model)
    return model.eval()


def budget_bytes(task: Task) -> int | None:
    """Return what the limit leaves to weights, slots and working memory."""
    if task.budget_bytes is not None or task.limit_bytes is None:
        return task.budget_bytes
    budget = task.limit_bytes - task.reserve_bytes
    if budget <= 0:
        raise MemoryError(
            f"the reserve of {task.reserve_bytes} bytes leaves no budget under a limit of "
            f"{task.limit_bytes}"
        )
    return budget


def weight_bytes(module: Any) -> int:
    """Return the bytes of a module's parameters."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def say_device(model: Any, device: str) -> None:
    """Let ``generate`` see where the model computes: it asks the first weight, which is away, and
    would send every input there first.
    """
    import torch

    here = torch.device(device)
    if here.type == "cuda":
        here = torch.device("cuda", torch.cuda.current_device())
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {"device": property(lambda self: here)})
