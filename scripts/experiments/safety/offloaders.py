"""The offloaders: each puts a model's weights into a folder and leaves it ready to be called.

``weight_files`` are the files that hold weights; accidents happen to all of them, because no
offloader needs to read every file again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from lib.errors import InputError, PlacementError
from lib.vocabulary import Tier

_BUDGET_SHARE = 0.7
"""Of the weights: some stay in fast memory, some move."""


Load = Callable[[Callable[[], nn.Module], Path, Path], tuple[nn.Module, Callable[[], None]]]
"""(How to build the model, its safetensors file, a folder) -> the model, and how to undo it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloader:
    """``offload`` returns how to undo it; ``load`` builds a model without weights and offloads
    those of a safetensors file, where it can. ``refusals`` are its clear errors, where it has any.
    """

    name: str
    offload: Callable[[nn.Module, Path], Callable[[], None]]
    weight_files: str
    module: str
    refusals: tuple[type[Exception], ...] = ()
    exact: bool = False
    load: Load | None = None

    def is_installed(self) -> bool:
        """Say whether its package can be imported."""
        return find_spec(self.module.partition(".")[0]) is not None


def _offload_ours(
    model: nn.Module, folder: Path, weights: Path | None = None
) -> Callable[[], None]:
    from lib.tiering import attach

    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    budget = {"HBM": round(_BUDGET_SHARE * num_bytes), "SSD": None}
    runtime = attach(model, budget=budget, weights=weights, spill_dir=folder)
    if all(placement.tier is not Tier.SSD for placement in runtime.plan.placements.values()):
        raise RuntimeError("nothing was offloaded: the row would say nothing")
    return runtime.detach


def _load_ours(
    build: Callable[[], nn.Module], file: Path, folder: Path
) -> tuple[nn.Module, Callable[[], None]]:
    from lib.tiering import empty_weights

    with empty_weights():
        model = build().eval()
    return model, _offload_ours(model, folder, file)


def _load_accelerate(
    build: Callable[[], nn.Module], file: Path, folder: Path
) -> tuple[nn.Module, Callable[[], None]]:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from accelerate.hooks import remove_hook_from_submodules

    with init_empty_weights():
        model = build().eval()
    layers = [f"layers.{name}" for name, _ in model.get_submodule("layers").named_children()]
    places: dict[str, int | str | torch.device] = {
        **dict.fromkeys(layers, "cpu"),
        layers[0]: "disk",
    }
    load_checkpoint_and_dispatch(model, str(file), device_map=places, offload_folder=str(folder))
    return model, lambda: remove_hook_from_submodules(model)


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
        load=_load_ours,
    ),
    Offloader(
        name="accelerate",
        offload=_offload_accelerate,
        weight_files="*.dat",
        module="accelerate.big_modeling",
        load=_load_accelerate,
    ),
    Offloader(
        name="diffusers",
        offload=_offload_diffusers,
        weight_files="*.safetensors",
        module="diffusers.hooks.group_offloading",
    ),
)
