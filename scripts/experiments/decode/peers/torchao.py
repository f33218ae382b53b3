"""torchao's weight-only int8 and int4, with its kernels for CPUs.

It quantizes nn.Linear alone: GPT-2's Conv1D become one first. A tied head becomes a matrix of its
own, and the embedding stays as it was. Its int4 packs 16 rows at a time: GPT-2's head of 50257 rows
stays as it was, too.
"""

from typing import Any

from scripts.experiments.decode.peers.base import Session, System, Task, register_system
from scripts.experiments.decode.peers.transformers import load_plain

_INT4_ROWS = 16
_GROUP_SIZE = 64
"""As ours. torchao's default, 128, would leave matrices alone whose rows aren't multiples of it."""


@register_system
class TorchAO(System):
    name = "torchao"
    widths = ("int8", "int4")
    package = "torchao"
    install = "pip install 'tierhints[torchao]'"

    def load(self, task: Task) -> Session:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        from scripts.experiments.decode.torch_session import TorchSession, measure_sizes

        model = load_plain(task, "fp32")
        replace_conv1d(model)
        if task.width == "int8":
            quantize_(model, Int8WeightOnlyConfig())
        else:
            config = PrototypeInt4WeightOnlyConfig(group_size=_GROUP_SIZE)
            quantize_(model, config, filter_fn=fits_int4)
        return TorchSession(model, measure_sizes(model))


def fits_int4(module: Any, name: str) -> bool:
    """Say whether torchao's int4 takes a module's weight."""
    import torch

    return isinstance(module, torch.nn.Linear) and module.out_features % _INT4_ROWS == 0


def replace_conv1d(model: Any) -> None:
    """Put a Linear in the place of each of GPT-2's Conv1D, which compute the same."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                inputs, outputs = child.weight.shape
                linear = torch.nn.Linear(inputs, outputs, device="meta")
                linear.weight = torch.nn.Parameter(child.weight.detach().t().contiguous())
                linear.bias = child.bias
                setattr(module, name, linear)
