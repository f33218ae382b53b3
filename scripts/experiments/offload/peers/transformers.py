"""Transformers' own offload to disk."""

from scripts.experiments.offload.peers.base import Loaded, System, Task, register_system


@register_system
class TransformersDisk(System):
    name = "transformers"
    label = "Transformers device_map disk"
    devices = ("cpu",)
    num_tokens = 6
    module = "accelerate"
    install = "pip install accelerate"

    def load(self, task: Task) -> Loaded:
        """``device_map`` to disk: weights are read from the checkpoint itself."""
        import torch
        from transformers import AutoModelForCausalLM

        return Loaded(
            model=AutoModelForCausalLM.from_pretrained(
                task.checkpoint,
                dtype=torch.float32,
                device_map={"": "disk"},
                offload_folder=str(task.folder),
            )
        )
