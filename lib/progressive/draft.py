"""The draft: a copy of a model whose weights are held compressed in fast memory.

It has the model's structure and settings, and no weights of its own in full: they are encoded from
the model's, or from its checkpoint.
"""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..codecs.encoded import EncodedWeight
from ..codecs.layout import RecordLayout
from ..tiering import Runtime
from ..tiering import attach as attach_tiers
from ..tiering.payload.known import KnownWeights
from ..tiering.stores import STAGING_BYTES
from .division import Division


class Draft:
    """A compressed copy of a model that is attached to fast memory."""

    def __init__(self, model: nn.Module, hints: Any, division: Division, **common: Any) -> None:
        """Make one of a model that isn't attached yet."""
        self.staging_bytes = STAGING_BYTES if division.residuals else 0
        """The memory in which residuals are decoded."""
        self.fast_bytes = division.draft.plan.fast_bytes + self.staging_bytes
        """The fast memory that it takes, and that in which residuals are decoded."""
        self.name = division.name
        """Its width, or which mixture of widths; None: what epsilon allows."""
        self.model: Any = _copy_structure(model).eval()  # dropout would only draft worse
        self.runtime: Runtime = attach_tiers(
            self.model, hints, precision=division.precision, **common
        )

    def known_weights(self) -> KnownWeights:
        """Return what it knows of the full weights."""
        return KnownWeights(dict(self._records()))

    def _records(self) -> Iterator[tuple[str, tuple[RecordLayout, Tensor]]]:
        for group in self.runtime._keeper.residency.groups.values():
            for part in group.payload.parts:
                weight = group.weights.compressed.get(part.parameter)
                if isinstance(weight, EncodedWeight) and not part.transposed:
                    yield part.parameter, (weight.layout, weight.record)

    def close(self) -> None:
        """Free its weights."""
        self.runtime.discard()


def _copy_structure(model: nn.Module) -> nn.Module:
    """Return a copy of a model that has its weights where they are: nothing is copied but buffers
    and settings.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False)
        for parameter in model.parameters()
    }
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied
