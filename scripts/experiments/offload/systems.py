"""What a compared system is, and those of a machine without a GPU (cuda_systems.py: with one).

Everything is imported inside: what a system doesn't need must not count in its memory. ``prepare``
runs once and without a limit: no system is charged for converting the checkpoint to its own files.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.units import MIB

_PACKING_BYTES = 48 * MIB
"""What a CPU's matrix products of many rows take to repack fp32 weights, from the first one on; the
compressed ones expand into the runtime's own scratch.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is to load. ``folder`` is the system's own, for its files; ``limit_bytes`` of
    host memory or, on a GPU, of its own.
    """

    checkpoint: Path
    folder: Path
    limit_bytes: int | None
    reserve_bytes: int
    budget_bytes: int | None
    machine: Path | None
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model ready to generate. ``moved_bytes`` counts the weight bytes brought so far, where a
    system says so; ``bytes_per_pass`` is what one moves in each pass by design. ``unit_bytes``: the
    transfers that it makes. ``warm_up_passes`` it wants before it is measured. ``facts`` go into
    the document.
    """

    model: Any
    moved_bytes: Callable[[], int] | None = None
    bytes_per_pass: int | None = None
    unit_bytes: int | None = None
    warm_up_passes: int = 0
    facts: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A way of running the model. ``num_tokens`` are timed unless the user says otherwise;
    ``exact``: its logits must be the resident model's bit for bit; ``limits_mib``: those that it is
    run under, None: all; ``module``: what must be installed.
    """

    name: str
    label: str
    peer: bool
    load: Callable[[Task], Loaded]
    prepare: Callable[[Task], None] | None = None
    limits_mib: tuple[int, ...] | None = None
    num_tokens: int = 12
    exact: bool = False
    full_precision: bool = True
    module: str | None = None
    install: str = ""

    def is_installed(self) -> bool:
        """Say whether its package can be imported."""
        return self.module is None or find_spec(self.module) is not None


def _load_config(task: Task) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(task.checkpoint)


def _load_resident(task: Task) -> Loaded:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.float32)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # out of the mapped file, which is page cache
    return Loaded(model=model)


def _prepare_accelerate(task: Task) -> None:
    from accelerate.utils.offload import offload_state_dict

    if not (task.folder / "index.json").exists():
        offload_state_dict(task.folder, _load_resident(task).model.state_dict())


def _load_accelerate(task: Task) -> Loaded:
    """``disk_offload`` over weights that lie in its folder already, on an empty model."""
    from accelerate import disk_offload, init_empty_weights
    from transformers import AutoModelForCausalLM

    config = _load_config(task)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return Loaded(model=disk_offload(model.eval(), task.folder, execution_device="cpu"))


def _load_transformers(task: Task) -> Loaded:
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


def _load_airllm(task: Task) -> Loaded:
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


def _prepare_airllm(task: Task) -> None:
    """Split the checkpoint into a file per layer, which loading does where they are missing."""
    _load_airllm(task)


def _load_ours(task: Task, precision: str | None) -> Loaded:
    """Under a limit, weights get what the process has not taken already, less the reserve."""
    from lib.checkpoint.load import load

    model = load(task.checkpoint)
    budget = task.budget_bytes
    used = anonymous_bytes()
    if budget is None and task.limit_bytes is not None:
        packing_bytes = 0 if precision else _PACKING_BYTES
        budget = task.limit_bytes - used - task.reserve_bytes - packing_bytes
        if budget <= 0:
            raise MemoryError(
                f"the process took {used / MIB:.0f} MiB before any weight: no budget is left"
            )
    return attach_ours(model, task, precision, budget_bytes=budget, below="SSD")


def attach_ours(
    model: Any, task: Task, precision: str | None, *, budget_bytes: int | None, below: str
) -> Loaded:
    """Attach our runtime to an empty model; what the budget doesn't hold goes to tier ``below``."""
    from lib.tiering import attach

    runtime = attach(
        model,
        hints=None,
        budget={"HBM": budget_bytes, below: None},
        precision=precision,
        weights=task.checkpoint,
        machine=task.machine,
        spill_dir=task.folder,
        device=task.device,
        mode="real",
    )
    plan = runtime.plan
    units = [size for placement in plan.placements.values() for size in placement.unit_bytes]
    return Loaded(
        model=model,
        moved_bytes=lambda: runtime.stats().bytes_moved,
        unit_bytes=round(statistics.median(units)) if units else None,
        facts=lambda: {"budget_bytes": budget_bytes, "plan": plan.to_json()},
    )


def anonymous_bytes() -> int:
    """Return this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon line")


RESIDENT = System(
    name="resident", label="resident fp32", peer=False, load=_load_resident, num_tokens=24
)
CPU_SYSTEMS: tuple[System, ...] = (
    RESIDENT,
    System(
        name="ours-lossless",
        label="ours, lossless",
        peer=False,
        load=lambda task: _load_ours(task, None),
        exact=True,
    ),
    System(
        name="ours-int8",
        label="ours, int8",
        peer=False,
        load=lambda task: _load_ours(task, "int8"),
        limits_mib=(900, 700),
        full_precision=False,
        num_tokens=24,
    ),
    System(
        name="ours-int4",
        label="ours, int4",
        peer=False,
        load=lambda task: _load_ours(task, "int4"),
        limits_mib=(900, 600),
        full_precision=False,
        num_tokens=24,
    ),
    System(
        name="transformers",
        label="Transformers device_map disk",
        peer=True,
        load=_load_transformers,
        num_tokens=6,
        module="accelerate",
        install="pip install accelerate",
    ),
    System(
        name="accelerate",
        label="Accelerate disk_offload",
        peer=True,
        load=_load_accelerate,
        num_tokens=6,
        prepare=_prepare_accelerate,
        module="accelerate",
        install="pip install accelerate",
    ),
    System(
        name="airllm",
        label="AirLLM",
        peer=True,
        load=_load_airllm,
        num_tokens=3,
        prepare=_prepare_airllm,
        module="airllm",
        install="pip install airllm",
    ),
)
