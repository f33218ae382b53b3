"""What a model's blocks take at each precision, and how a budget in bits per weight is counted.

Bits per weight are those of the records, scales and headers included, over the weights that the
records hold. Norms and biases stay raw whatever is chosen: they add the same bytes to every choice
and are left out on both sides.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..blocks import partition_model
from ..codecs.storage import stored_bytes, weight_form
from ..vocabulary import Precision
from .allocate import Option
from .perturb import curve_precisions, lossy_blocks
from .sensitivity import Curves, monotone

PrecisionMap = Mapping[str, Precision]
"""Block -> the precision that it is held at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSizes:
    """The blocks that have a choice of precisions, from input to output, and what each takes."""

    num_params: Mapping[str, int]
    """Block -> number of weights, those that stay raw included."""
    precisions: tuple[Precision, ...]
    num_bytes: Mapping[tuple[str, Precision], int]
    raw_bytes: int
    """The blocks' norms and biases: part of ``num_bytes`` at every precision."""
    other_bytes: int
    """Blocks without a choice."""
    num_weights: int
    """Weights that records hold."""

    def budget(self, bits: float) -> float:
        """Return the bytes of these blocks at an average of bits per weight."""
        return bits / 8 * self.num_weights + self.raw_bytes

    def bytes_of(self, plan: PrecisionMap) -> int:
        """Return the bytes that these blocks take in a plan."""
        return sum(self.num_bytes[pair] for pair in plan.items())

    def bits_of(self, plan: PrecisionMap) -> float:
        """Return the average bits per weight of a plan."""
        return (self.bytes_of(plan) - self.raw_bytes) * 8 / self.num_weights

    def uniform(self, precision: Precision) -> dict[str, Precision]:
        """Return the plan of one precision for all."""
        return dict.fromkeys(self.num_params, precision)

    def options(self, curves: Curves) -> dict[str, list[Option]]:
        """Return what can be chosen for each block, with the KL that ``curves`` predict."""
        options = {}
        for block in self.num_params:
            curve = monotone({precision: curves[block][precision] for precision in self.precisions})
            options[block] = [Option(p, self.num_bytes[block, p], kl) for p, kl in curve.items()]
        return options


def stored_sizes(
    model: nn.Module,
    precisions: Sequence[Precision] | None = None,
    *,
    names: Collection[str] | None = None,
) -> StoredSizes:
    """Measure a model's records at all precisions below its own, or at some. ``names``: blocks that
    may be chosen for, such as those that have a curve; the others stay as they are.
    """
    precisions = tuple(precisions or curve_precisions(model))
    blocks = [
        block
        for block in lossy_blocks(model, precisions[-1])
        if names is None or block.name in names
    ]
    raw = [
        piece
        for block in blocks
        for piece in block.pieces
        if weight_form(model, piece.parameter, precisions[-1]) is None
    ]
    total = sum(block.num_params for block in blocks)
    return StoredSizes(
        num_params={block.name: block.num_params for block in blocks},
        precisions=precisions,
        num_bytes={
            (block.name, precision): stored_bytes(model, block, precision)
            for block in blocks
            for precision in precisions
        },
        raw_bytes=sum(piece.num_bytes for piece in raw),
        other_bytes=sum(block.num_bytes for block in partition_model(model))
        - sum(block.num_bytes for block in blocks),
        num_weights=total - sum(piece.num_params for piece in raw),
    )
