"""Transformers alone: the model as its users have it, in fp32 and in bf16."""

from typing import Any

from scripts.experiments.decode.peers.base import Session, System, Task, register_system


@register_system
class Transformers(System):
    name = "transformers"
    widths = ("fp32", "bf16")
    package = "transformers"
    install = "pip install transformers"

    def load(self, task: Task) -> Session:
        from scripts.experiments.decode.torch_session import TorchSession, measure_sizes

        model = load_plain(task, task.width)
        return TorchSession(model, measure_sizes(model))


def load_plain(task: Task, width: str) -> Any:
    """Return the model in memory of its own, fp32 or bf16."""
    import torch

    from lib.checkpoint.models import cast_weights, load_model, quiet_transformers

    quiet_transformers(progress=False)
    model = load_model(str(task.checkpoint))
    cast_weights(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[width])
    return model
