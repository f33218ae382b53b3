"""Parameters of a model by canonical name: tied ones once, sharded ones whole."""

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel or torch.compile wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def unique_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return canonical name -> parameter; a tied parameter appears once, under its first name."""
    return dict(unwrap_model(model).named_parameters())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Measure the memory behind tensors: bytes of their storages, each counted once."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
    }
    return sum(storages.values())


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, of which each rank has a part; without importing it."""
    return hasattr(tensor, "full_tensor")


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded DTensor (collective: every rank must call it); any other tensor passes
    through.
    """
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if gather is not None else tensor
