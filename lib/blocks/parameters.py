"""Parameters of a model by canonical name: tied ones once, sharded ones whole, and their digest."""

import hashlib
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

_DIGEST_SAMPLES = 65_536
"""Elements of one parameter that enter the digest; enough to tell two checkpoints apart, cheap at
any size.
"""


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


def parameter_digest(model: nn.Module) -> str:
    """Identify a model's weights: ``digest_parameters`` of all of them, by canonical name."""
    return digest_parameters(
        (name, parameter.detach()) for name, parameter in sorted(unique_parameters(model).items())
    )


def digest_parameters(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over names, shapes and values rounded to bfloat16; names must be sorted.

    Large parameters are sampled evenly, so this is an identity and no integrity check. The rounding
    makes a model loaded in bfloat16 have the digest of its float32 original; float16 may round
    twice and differ. Gathers DTensor (collective).
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        values = whole_tensor(parameter).reshape(-1)
        if values.numel() > _DIGEST_SAMPLES:
            index = (
                torch.arange(_DIGEST_SAMPLES, device=values.device)
                * values.numel()
                // _DIGEST_SAMPLES
            )
            values = values[index]
        if values.is_floating_point():
            values = values.to(torch.bfloat16)
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded DTensor (collective: every rank must call it); any other tensor passes
    through.
    """
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if gather is not None else tensor
