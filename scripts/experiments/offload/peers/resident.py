"""The whole model in fast memory, without a limit: what the others are compared with."""

from scripts.experiments.offload.peers.base import Loaded, System, Task, register_system
from scripts.experiments.offload.peers.host_model import load_on_host


@register_system
class ResidentInHostMemory(System):
    name = "resident"
    label = "resident fp32"
    devices = ("cpu",)
    peer = False
    num_tokens = 24

    def load(self, task: Task) -> Loaded:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.float32)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # out of the mapped file, which is page cache
        return Loaded(model=model)


@register_system
class ResidentOnGpu(System):
    name = "resident"
    label = "resident bf16"
    devices = ("cuda",)
    peer = False
    num_tokens = 24

    def load(self, task: Task) -> Loaded:
        return Loaded(model=load_on_host(task).to(task.device), bytes_per_pass=0)
