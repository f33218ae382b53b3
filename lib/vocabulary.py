"""The words of the whole project: tiers, precisions and their order, states of a block."""

from collections.abc import Sequence
from enum import StrEnum


class Tier(StrEnum):
    """A place for weights, nearest to the compute first."""

    HBM = "HBM"
    CPU = "CPU"
    CXL = "CXL"
    PEER = "PEER"
    SSD = "SSD"
    OBJECT = "OBJECT"


class Precision(StrEnum):
    """How a block's weights may be stored, most precise first."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT6 = "int6"
    INT5 = "int5"
    INT4 = "int4"
    INT3 = "int3"
    INT2 = "int2"


_ORDER = {precision: rank for rank, precision in enumerate(Precision)}


def is_below(precision: Precision, floor: Precision) -> bool:
    """Say whether a precision is less precise than another."""
    return _ORDER[precision] > _ORDER[floor]


def most_precise(precisions: Sequence[Precision]) -> Precision | None:
    """Return the most precise of some; None if there are none."""
    return min(precisions, key=_ORDER.__getitem__, default=None)


def precision_rank(precision: Precision) -> int:
    """Return the place of a precision in the order from most to least precise, from 0."""
    return list(Precision).index(precision)


class State(StrEnum):
    """Where a block is, and in which form."""

    FULL = "S1"
    """Full precision in fast memory."""
    REDUCED = "S2"
    """Reduced precision in fast memory, computed with as it is."""
    COMPRESSED = "S3"
    """Compressed in fast memory, expanded when used."""
    STAGED = "S4"
    """In the memory of the host, or of a neighbour of the compute device."""
    COLD = "S5"
    """On storage."""
    IN_FLIGHT = "S6"
    """On its way into a slot or a place in fast memory."""
    RECOMPUTABLE = "S7"
    """Held nowhere: made again from a seed, a tied or a low-rank source."""
