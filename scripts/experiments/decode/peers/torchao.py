"""torchao's weight-only int8 and int4, with its kernels for CPUs.

It quantizes nn.Linear alone: GPT-2's Conv1D become one first. A tied head becomes a matrix of its
own, and the embedding stays as it was.
"""

from typing import Any

from scripts.experiments.decode.peers.base import Session, System, Task, register_system
from scripts.experiments.decode.peers.transformers import load_plain

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
        config: Any = (
            Int8WeightOnlyConfig()
            if task.width == "int8"
            else PrototypeInt4WeightOnlyConfig(group_size=_GROUP_SIZE)
        )
        quantize_(model, config)
        return TorchSession(model, measure_sizes(model))


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
