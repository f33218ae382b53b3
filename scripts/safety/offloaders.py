"""The offloaders: each puts a model's weights into a folder and leaves it ready to be called.

``weight_files`` are the files that hold weights; accidents happen to all of them, because no
offloader needs to read every file again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from lib.blocks import storage_bytes
from lib.errors import InputError, PlacementError
from lib.hints import Tier

_BUDGET_SHARE = 0.7
"""Of the weights: some stay in fast memory, some move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloader:
    """``offload`` returns how to undo it; ``refusals`` are its clear errors, where it has any."""

    name: str
    offload: Callable[[nn.Module, Path], Callable[[], None]]
    weight_files: str
    module: str
    refusals: tuple[type[Exception], ...] = ()
    exact: bool = False

    def is_installed(self) -> bool:
        """Say whether its package can be imported."""
        return find_spec(self.module.partition(".")[0]) is not None


def _offload_ours(model: nn.Module, folder: Path) -> Callable[[], None]:
    from lib.tiering import attach

    budget = round(_BUDGET_SHARE * storage_bytes(model.parameters()))
    runtime = attach(
        model, hints=None, budget={"HBM": budget, "SSD": None}, mode="real", spill_dir=folder
    )
    if all(placement.tier is not Tier.SSD for placement in runtime.plan.placements.values()):
        raise RuntimeError("nothing was offloaded: the row would say nothing")
    return runtime.detach


def _offload_accelerate(model: nn.Module, folder: Path) -> Callable[[], None]:
    from accelerate import disk_offload
    from accelerate.hooks import remove_hook_from_submodules

    disk_offload(model, folder, execution_device="cpu")
    return lambda: remove_hook_from_submodules(model)


def _offload_diffusers(model: nn.Module, folder: Path) -> Callable[[], None]:
    import_module("diffusers.hooks").apply_group_offloading(
        model,
        onload_device="cpu",
        offload_device="cpu",
        offload_type="leaf_level",
        offload_to_disk_path=str(folder),
    )
    return lambda: None


OFFLOADERS = (
    Offloader(
        name="ours",
        offload=_offload_ours,
        weight_files="*.block",
        module="lib.tiering",
        refusals=(InputError, PlacementError),
        exact=True,
    ),
    Offloader(
        name="accelerate",
        offload=_offload_accelerate,
        weight_files="*.dat",
        module="accelerate.big_modeling",
    ),
    Offloader(
        name="diffusers",
        offload=_offload_diffusers,
        weight_files="*.safetensors",
        module="diffusers.hooks.group_offloading",
    ),
)
