"""What a kernel is: a form in which a compressed weight lies in fast memory and computes.

``kernels`` chooses one; docs/extending.md shows how to add one, and
tests/unit/codecs/test_every_kernel.py is the suite that each passes.
"""

from enum import StrEnum
from typing import ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ..registry import Registry
from .layout import RecordLayout
from .scratch import Scratch


class Use(StrEnum):
    """What a module does with a weight. ``WHOLE``: anything else, for which it is expanded."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    WHOLE = "whole"


class CompressedWeight(Protocol):
    """A matrix (rows = out features, cols = in features) that computes without being expanded.

    For inference, on one device. Beside ``num_bytes`` it takes fast memory for results alone, and
    from the scratch that it is given: at most 10 bytes a code, of 64 rows at a time or fewer.
    """

    name: ClassVar[str]
    linear_error: ClassVar[float]
    """Bound of the error of ``linear`` over the sum of the magnitudes of what is added up, against
    the product in float64 with what ``codecs.decode`` gives.
    """
    decoding_error: ClassVar[float]
    """Bound of the error of ``rows`` and ``expand`` over the largest weight that ``codecs.decode``
    gives, in fp32.
    """
    shape: tuple[int, int]
    dtype: torch.dtype
    """The weight's own, in which ``rows`` and ``expand`` return it."""
    looks_up: bool
    """It has ``rows``."""

    @classmethod
    def supports(cls, layout: RecordLayout, uses: frozenset[Use], device: torch.device) -> bool:
        """Say whether it takes records of this layout, for these uses, on this device."""

    @classmethod
    def planned_bytes(cls, layout: RecordLayout) -> int:
        """Return the ``num_bytes`` of what ``allocate`` will make, without data."""

    @classmethod
    def allocate(
        cls, layout: RecordLayout, *, dtype: torch.dtype, device: torch.device, scratch: Scratch
    ) -> Self:
        """Make one to be filled, in new memory on ``device``, where ``scratch`` is."""

    @property
    def num_bytes(self) -> int:
        """Bytes of fast memory held, scratch not counted."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``: (..., cols) -> (..., rows) in the dtype of ``x``."""

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows by index: any shape -> (*ids.shape, cols)."""

    def expand(self, start_row: int, end_row: int) -> Tensor:
        """Decode some rows, (n, cols): new memory of that size."""

    def fill(self, start_row: int, record: Tensor, layout: RecordLayout) -> None:
        """Take over some rows from the record of these rows, which may be on the CPU; nothing of it
        is kept. ``start_row`` and the number of rows are multiples of 64, up to the last row.
        """


KERNELS: Registry[type[CompressedWeight]] = Registry("kernel")
"""The one that was registered last is asked first whether it supports a weight."""
KernelClass = TypeVar("KernelClass", bound=type[CompressedWeight])


def register_kernel(kernel: KernelClass) -> KernelClass:
    """Let a class hold weights, before those that are registered so far: a decorator."""
    KERNELS.add(kernel.name, kernel)
    return kernel
