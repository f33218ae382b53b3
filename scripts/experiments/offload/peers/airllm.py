"""AirLLM, which reads a file per layer."""

from importlib import import_module
from typing import Any

from scripts.experiments.offload.peers.base import Loaded, System, Task, register_system


@register_system
class AirLLM(System):
    name = "airllm"
    label = "AirLLM"
    devices = ("cpu",)
    num_tokens = 3
    module = "airllm"
    install = "pip install airllm"
    needs_preparing = True

    def load(self, task: Task) -> Loaded:
        """AirLLM has no GPT-2, but lets a class name its layers; positions stay resident."""
        import torch

        def set_layer_names_dict(model: Any) -> None:
            model.layer_names_dict = {
                "embed": "transformer.wte",
                "layer_prefix": "transformer.h",
                "norm": "transformer.ln_f",
                "lm_head": "lm_head",
                "resident": ["transformer.wpe"],
            }

        base = import_module("airllm").AirLLMBaseModel
        model_class = type("AirLLMGPT2", (base,), {"set_layer_names_dict": set_layer_names_dict})
        model = model_class(
            str(task.checkpoint),
            device="cpu",
            dtype=torch.float32,
            layer_shards_saving_path=str(task.folder),
        )
        return Loaded(model=model)

    def prepare(self, task: Task) -> None:
        """Split the checkpoint into a file per layer, which loading does where they are missing."""
        self.load(task)
