"""Diffusers' group offload: a layer or a leaf module is a group."""

from typing import Any

from scripts.experiments.offload.peers.base import Loaded, System, Task, register_system
from scripts.experiments.offload.peers.host_model import load_on_host, say_device, weight_bytes


@register_system
class DiffusersBlocks(System):
    name = "diffusers-block"
    label = "Diffusers group offload, blocks"
    devices = ("cuda",)
    module = "diffusers"
    install = "pip install diffusers"

    def load(self, task: Task) -> Loaded:
        """A layer is a group. The call finds layers among a module's own children only, hence the
        inner model; the head beside it stays on the device.
        """
        model = load_on_host(task)
        moved = weight_bytes(model.model)
        model.lm_head.to(task.device)
        _group_offload(model.model, task, offload_type="block_level", num_blocks_per_group=1)
        say_device(model, task.device)
        return Loaded(model=model, bytes_per_pass=moved)


@register_system
class DiffusersLeaves(System):
    name = "diffusers-leaf"
    label = "Diffusers group offload, leaves"
    devices = ("cuda",)
    module = "diffusers"
    install = "pip install diffusers"

    def load(self, task: Task) -> Loaded:
        model = load_on_host(task)
        moved = weight_bytes(model)
        _group_offload(model, task, offload_type="leaf_level")
        say_device(model, task.device)
        return Loaded(model=model, bytes_per_pass=moved)


def _group_offload(module: Any, task: Task, **choices: Any) -> None:
    """Call it with a stream, and with its faster way of handing memory back (record_stream)."""
    import torch
    from diffusers.hooks import apply_group_offloading

    streams = task.device != "cpu"
    apply_group_offloading(
        module,
        onload_device=torch.device(task.device),
        offload_device=torch.device("cpu"),
        use_stream=streams,
        record_stream=streams,
        exclude_kwargs=["past_key_values"],  # the cache is on the device, and is changed in place
        **choices,
    )
