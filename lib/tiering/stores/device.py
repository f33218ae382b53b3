"""Payloads in the compute device's own memory: what emulation keeps in place of slower tiers."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from ...vocabulary import Tier
from .base import StoreOptions, aligned_buffer
from .host import MemoryStore
from .limits import available_memory


class DeviceStore(MemoryStore):
    """Memory of the device; of the machine where that is the CPU."""

    tier: ClassVar[Tier] = Tier.HBM

    def __init__(self, device: torch.device) -> None:
        super().__init__(pinned=False)
        self._device = device

    @classmethod
    def open(cls, options: StoreOptions) -> Self:
        """Make a store on the compute device."""
        return cls(options.device)

    def used_bytes(self) -> int:
        """Measure the memory held."""
        return sum(payload.numel() for payload in self._payloads.values())

    def capacity_bytes(self) -> int:
        """Measure the device memory that is left."""
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return available_memory()

    def _allocate(self, num_bytes: int) -> Tensor:
        if self._device.type == "cpu":
            return aligned_buffer(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
