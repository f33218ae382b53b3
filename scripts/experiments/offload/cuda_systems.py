"""The systems compared on a GPU: each holds a Llama in host memory and computes on the device.

The device's memory is limited for everybody alike (meters.py), so that no system's own limit needs
to be trusted. Everything is imported inside, as in systems.py. With the device "cpu" they run, too,
without streams: that is for tests of the calls.
"""

from importlib import import_module
from typing import Any

from scripts.experiments.offload.systems import Loaded, System, Task, attach_ours

_FLEXTENSOR_DISCOVERY, _FLEXTENSOR_PROFILING = 1, 10


def _load_on_host(task: Task) -> Any:
    """Load the whole model into host memory, out of the mapped file."""
    from transformers import AutoModelForCausalLM

    from lib.checkpoint.models import own_memory

    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype="auto")
    own_memory(model)
    return model.eval()


def _load_resident(task: Task) -> Loaded:
    return Loaded(model=_load_on_host(task).to(task.device), bytes_per_pass=0)


def _load_ours(task: Task, precision: str | None) -> Loaded:
    from lib.checkpoint.load import load

    model = load(task.checkpoint)
    below = "SSD" if task.device == "cpu" else "CPU"
    budget = _budget_bytes(task)
    return attach_ours(model, task, precision, budget_bytes=budget, below=below)


def _load_accelerate(task: Task) -> Loaded:
    """``cpu_offload``: each module's weights are copied to the device before it computes."""
    import torch
    from accelerate import cpu_offload

    model = _load_on_host(task)
    moved = _weight_bytes(model)  # before they are put away
    cpu_offload(model, execution_device=torch.device(task.device))
    return Loaded(model=model, bytes_per_pass=moved)


def _load_diffusers_blocks(task: Task) -> Loaded:
    """A layer is a group. The call finds layers among a module's own children only, hence the inner
    model; the head beside it stays on the device.
    """
    model = _load_on_host(task)
    moved = _weight_bytes(model.model)
    model.lm_head.to(task.device)
    _group_offload(model.model, task, offload_type="block_level", num_blocks_per_group=1)
    _say_device(model, task.device)
    return Loaded(model=model, bytes_per_pass=moved)


def _load_diffusers_leaves(task: Task) -> Loaded:
    model = _load_on_host(task)
    moved = _weight_bytes(model)
    _group_offload(model, task, offload_type="leaf_level")
    _say_device(model, task.device)
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


def _load_flextensor(task: Task) -> Loaded:
    """As its quick start and its vLLM worker do: a unit for each layer, what is left on the device.

    It learns during its first passes, which are not measured. Its fraction of the device's memory
    is the budget that ours gets.
    """
    import torch

    flextensor = import_module("flextensor")
    model = _load_on_host(task)
    model.model.rotary_emb.to(task.device)
    device = torch.device(task.device, torch.cuda.current_device())
    budget = _budget_bytes(task)
    config = flextensor.OffloadConfig(
        gpu_device=device.index,
        discovery_iters=_FLEXTENSOR_DISCOVERY,
        profiling_iters=_FLEXTENSOR_PROFILING,
        include_patterns=["model.embed_tokens", "model.layers.*", "model.norm", "lm_head"],
        max_gpu_mem_fraction=None
        if budget is None
        else budget / torch.cuda.get_device_properties(device).total_memory,
    )
    model = flextensor.offload(model, config=config)
    _say_device(model, task.device)
    return Loaded(
        model=model,
        # One more, so that the first measured pass is not the one that it plans in.
        warm_up_passes=_FLEXTENSOR_DISCOVERY + _FLEXTENSOR_PROFILING + 1,
        facts=lambda: {"budget_bytes": budget},
    )


def _budget_bytes(task: Task) -> int | None:
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


def _weight_bytes(module: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _say_device(model: Any, device: str) -> None:
    """Let ``generate`` see where the model computes: it asks the first weight, which is away, and
    would send every input there first.
    """
    import torch

    here = torch.device(device)
    if here.type == "cuda":
        here = torch.device("cuda", torch.cuda.current_device())
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {"device": property(lambda self: here)})


CUDA_SYSTEMS: tuple[System, ...] = (
    System(name="resident", label="resident bf16", peer=False, load=_load_resident, num_tokens=24),
    System(
        name="ours-lossless",
        label="ours, lossless",
        peer=False,
        load=lambda task: _load_ours(task, None),
        exact=True,
        num_tokens=24,
    ),
    System(
        name="ours-int8",
        label="ours, int8",
        peer=False,
        load=lambda task: _load_ours(task, "int8"),
        full_precision=False,
        num_tokens=24,
    ),
    System(
        name="ours-int4",
        label="ours, int4",
        peer=False,
        load=lambda task: _load_ours(task, "int4"),
        full_precision=False,
        num_tokens=24,
    ),
    System(
        name="accelerate",
        label="Accelerate cpu_offload",
        peer=True,
        load=_load_accelerate,
        num_tokens=6,
        module="accelerate",
        install="pip install accelerate",
    ),
    System(
        name="diffusers-block",
        label="Diffusers group offload, blocks",
        peer=True,
        load=_load_diffusers_blocks,
        module="diffusers",
        install="pip install diffusers",
    ),
    System(
        name="diffusers-leaf",
        label="Diffusers group offload, leaves",
        peer=True,
        load=_load_diffusers_leaves,
        module="diffusers",
        install="pip install diffusers",
    ),
    System(
        name="flextensor",
        label="FlexTensor",
        peer=True,
        load=_load_flextensor,
        module="flextensor",
        install="pip install flextensor",
    ),
)
