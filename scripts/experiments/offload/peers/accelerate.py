"""Accelerate: from its folder on disk, and from host memory to a GPU."""

from scripts.experiments.offload.peers.base import Loaded, System, Task, register_system
from scripts.experiments.offload.peers.host_model import load_on_host, weight_bytes
from scripts.experiments.offload.peers.resident import ResidentInHostMemory


@register_system
class AccelerateDisk(System):
    name = "accelerate"
    label = "Accelerate disk_offload"
    devices = ("cpu",)
    num_tokens = 6
    module = "accelerate"
    install = "pip install accelerate"
    needs_preparing = True

    def load(self, task: Task) -> Loaded:
        """``disk_offload`` over weights that lie in its folder already, on an empty model."""
        from accelerate import disk_offload, init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(task.checkpoint)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        return Loaded(model=disk_offload(model.eval(), task.folder, execution_device="cpu"))

    def prepare(self, task: Task) -> None:
        from accelerate.utils.offload import offload_state_dict

        if not (task.folder / "index.json").exists():
            offload_state_dict(task.folder, ResidentInHostMemory().load(task).model.state_dict())


@register_system
class AccelerateHost(System):
    name = "accelerate"
    label = "Accelerate cpu_offload"
    devices = ("cuda",)
    num_tokens = 6
    module = "accelerate"
    install = "pip install accelerate"

    def load(self, task: Task) -> Loaded:
        """``cpu_offload``: each module's weights are copied to the device before it computes."""
        import torch
        from accelerate import cpu_offload

        model = load_on_host(task)
        moved = weight_bytes(model)  # before they are put away
        cpu_offload(model, execution_device=torch.device(task.device))
        return Loaded(model=model, bytes_per_pass=moved)
