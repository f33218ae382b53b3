"""Our runtime: lossless, and with every matrix compressed; from the disk, and from host memory."""

import statistics
from typing import Any, ClassVar

from lib.units import MIB
from scripts.experiments.offload.peers.base import (
    Loaded,
    System,
    Task,
    anonymous_bytes,
    register_system,
)
from scripts.experiments.offload.peers.host_model import budget_bytes

_PACKING_BYTES = 48 * MIB
"""What a CPU's matrix products of many rows take to repack fp32 weights, from the first one on; the
compressed ones expand into the runtime's own scratch.
"""


@register_system
class LosslessFromDisk(System):
    name = "ours-lossless"
    label = "ours, lossless"
    devices = ("cpu",)
    peer = False
    exact = True
    precision: ClassVar[str | None] = None

    def load(self, task: Task) -> Loaded:
        """Under a limit, weights get what the process has not taken already, less the reserve."""
        from lib.checkpoint.load import load

        model = load(task.checkpoint)
        budget = task.budget_bytes
        used = anonymous_bytes()
        if budget is None and task.limit_bytes is not None:
            packing_bytes = 0 if self.precision else _PACKING_BYTES
            budget = task.limit_bytes - used - task.reserve_bytes - packing_bytes
            if budget <= 0:
                raise MemoryError(
                    f"the process took {used / MIB:.0f} MiB before any weight: no budget is left"
                )
        return _attach(model, task, self.precision, budget_bytes=budget, below="SSD")


@register_system
class Int8FromDisk(LosslessFromDisk):
    name = "ours-int8"
    label = "ours, int8"
    exact = False
    full_precision = False
    precision = "int8"
    limits_mib = (900, 700)
    num_tokens = 24


@register_system
class Int4FromDisk(Int8FromDisk):
    name = "ours-int4"
    label = "ours, int4"
    precision = "int4"
    limits_mib = (900, 600)


@register_system
class ExactFromDisk(LosslessFromDisk):
    name = "ours-exact"
    label = "ours, exact"
    exact = False
    drafts = True
    limits_mib = None
    num_tokens = 128
    needs_preparing = True

    def prepare(self, task: Task) -> None:
        """Let Inductor compile the draft's step, which it keeps."""
        from lib.checkpoint.load import load

        assert task.budget_bytes is not None
        loaded = _attach_exact(load(task.checkpoint), task, budget_bytes=task.budget_bytes)
        import torch

        with torch.no_grad():
            loaded.model.generate(
                torch.zeros((1, 8), dtype=torch.long), max_new_tokens=4, min_new_tokens=4
            )

    def load(self, task: Task) -> Loaded:
        """Takes the budget that it is given: the compiler's memory comes later."""
        from lib.checkpoint.load import load

        model = load(task.checkpoint)
        assert task.budget_bytes is not None
        return _attach_exact(model, task, budget_bytes=task.budget_bytes)


@register_system
class LosslessFromHost(System):
    name = "ours-lossless"
    label = "ours, lossless"
    devices = ("cuda",)
    peer = False
    exact = True
    num_tokens = 24
    precision: ClassVar[str | None] = None

    def load(self, task: Task) -> Loaded:
        from lib.checkpoint.load import load

        model = load(task.checkpoint)
        below = "SSD" if task.device == "cpu" else "CPU"
        budget = budget_bytes(task)
        return _attach(model, task, self.precision, budget_bytes=budget, below=below)


@register_system
class Int8FromHost(LosslessFromHost):
    name = "ours-int8"
    label = "ours, int8"
    exact = False
    full_precision = False
    precision = "int8"


@register_system
class Int4FromHost(Int8FromHost):
    name = "ours-int4"
    label = "ours, int4"
    precision = "int4"


def _attach_exact(model: Any, task: Task, *, budget_bytes: int) -> Loaded:
    """Attach with a compiled draft, of the width that hints predict to be the fastest."""
    from lib.progressive.attach import attach
    from lib.progressive.exact import ExactRuntime

    runtime = attach(
        model,
        task.hints,
        budget={"HBM": budget_bytes, "SSD": None},
        exact=True,
        weights=task.checkpoint,
        machine=task.machine,
        spill_dir=task.folder,
    )
    assert isinstance(runtime, ExactRuntime)
    runtime.compile()

    def facts() -> dict[str, Any]:
        stats = runtime.stats()
        drafting = stats.drafting
        hidden = stats.link_seconds - stats.transfer_seconds
        alone = drafting.drafted - drafting.ahead  # while no pass was computed
        return {
            "budget_bytes": budget_bytes,
            "plan": runtime.plan.to_json(),
            "drafting": {
                "windows": drafting.windows,
                "mean_window": drafting.drafted / max(drafting.windows, 1),
                "acceptance": drafting.acceptance,
                "hidden_share": hidden / stats.link_seconds if stats.link_seconds else None,
                "draft_tokens_per_s": alone / drafting.draft_seconds if alone else None,
                "draft_seconds": drafting.draft_seconds,
                "pass_seconds": drafting.pass_seconds,
                "precision": runtime.draft.name,
            },
        }

    return Loaded(
        model=model,
        moved_bytes=lambda: runtime.stats().bytes_moved,
        warm_up_passes=24,
        after_warm_up=runtime.reset_stats,
        facts=facts,
    )


def _attach(
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
