"""FlexTensor, which plans its own offload."""

from importlib import import_module

from scripts.experiments.offload.peers.base import Loaded, System, Task, register_system
from scripts.experiments.offload.peers.host_model import budget_bytes, load_on_host, say_device

_DISCOVERY, _PROFILING = 1, 10


@register_system
class FlexTensor(System):
    name = "flextensor"
    label = "FlexTensor"
    devices = ("cuda",)
    module = "flextensor"
    install = "pip install flextensor"

    def load(self, task: Task) -> Loaded:
        """As its quick start and its vLLM worker do: a unit for each layer, what is left on the
        device.

        It learns during its first passes, which are not measured. Its fraction of the device's
        memory is the budget that ours gets.
        """
        import torch

        flextensor = import_module("flextensor")
        model = load_on_host(task)
        model.model.rotary_emb.to(task.device)
        device = torch.device(task.device, torch.cuda.current_device())
        budget = budget_bytes(task)
        config = flextensor.OffloadConfig(
            gpu_device=device.index,
            discovery_iters=_DISCOVERY,
            profiling_iters=_PROFILING,
            include_patterns=["model.embed_tokens", "model.layers.*", "model.norm", "lm_head"],
            max_gpu_mem_fraction=None
            if budget is None
            else budget / torch.cuda.get_device_properties(device).total_memory,
        )
        model = flextensor.offload(model, config=config)
        say_device(model, task.device)
        return Loaded(
            model=model,
            # One more, so that the first measured pass is not the one that it plans in.
            warm_up_passes=_DISCOVERY + _PROFILING + 1,
            facts=lambda: {"budget_bytes": budget},
        )
