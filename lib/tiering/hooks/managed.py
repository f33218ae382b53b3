"""Models that are managed already, by this or another offloader."""

import weakref

from torch import nn

from ...errors import InputError, PlacementError

attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Modules of models that a runtime holds; weak, so that a forgotten model is freed."""


def refuse_managed(model: nn.Module) -> None:
    """Raise PlacementError where this or another offloader manages the model, InputError where it
    is compiled.
    """
    if any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in model.modules()
    ):
        raise InputError("the model is compiled (torch.compile): attach to the uncompiled model")
    for name, module in model.named_modules():
        place = f"module {name!r}" if name else "the model"
        if module in attached:
            raise PlacementError(f"{place} is attached already: detach its runtime first")
        if hasattr(module, "_hf_hook"):
            raise PlacementError(
                f"{place} is managed by Accelerate: remove_hook_from_submodules(model) first, or "
                "load without device_map"
            )
        if hasattr(module, "_diffusers_hook"):
            raise PlacementError(
                f"{place} has Diffusers hooks (group offloading): remove them first"
            )
