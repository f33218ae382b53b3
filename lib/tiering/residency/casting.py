"""Autocast: torch computes with a copy of each weight in a lower precision.

It keeps the copies of trainable weights until the outermost context ends, so that a model of any
size would be in memory a second time. While a model runs they aren't kept: the copy of one
operation's weights is all there is, and budgets have room for it.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ...codecs.kernels import Use
from ..payload.layout import Payload


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what autocast computes in on a device; None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast_input(x: Tensor) -> Tensor:
    """Return an operand of a matrix product as autocast would give it to torch's own."""
    dtype = autocast_dtype(x.device)
    return x.to(dtype) if dtype and x.is_floating_point() and x.dtype != torch.float64 else x


class UnkeptCopies:
    """A context in which autocast keeps no copies; what was kept in it against that goes after.
    ``num_bytes`` is what they are expected to take.
    """

    def __init__(self, num_bytes: int = 0) -> None:
        self.num_bytes = num_bytes

    def __enter__(self) -> Self:
        """Keep none from now on."""
        self._kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Drop all copies (a module may have entered a context of its own), and keep them again."""
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self._kept)


def copy_bytes(payload: Payload, dtypes: Iterable[torch.dtype], *, whole: bool) -> int:
    """Return what the copies of a group's weights take while its module computes; ``whole``: also
    of weights that move by rows, of which one shard at a time is copied otherwise.
    """
    return max((_copy_bytes(payload, dtype, whole) for dtype in dtypes), default=0)


def _copy_bytes(payload: Payload, dtype: torch.dtype, whole: bool) -> int:
    total = 0
    for part in payload.parts:
        casts = part.dtype.is_floating_point and part.dtype not in (dtype, torch.float64)
        computes_as_record = part.record is not None and not part.expanded_bytes
        if casts and not computes_as_record and part.uses != {Use.EMBEDDING}:
            rows = part.rows
            if payload.by_rows and not whole:
                rows = max(shard.end - shard.start for shard in payload.shards)
            total += rows * part.columns * dtype.itemsize
    return total
