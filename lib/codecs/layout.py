"""Where each byte of an encoded weight lies: pure arithmetic, no torch.

A record holds one matrix of ``rows`` x ``cols`` weights (a Linear's weight: out x in features):

    header | scales | zeros | most significant plane | next plane | ...

each section at a multiple of 256 bytes. A raw precision (fp32, bf16, fp16) has one plane and
neither scales nor zeros. Codes of 8 = 4+2+2, 6 = 4+2, 5 = 4+1, 4, 3 = 2+1 and 2 bits are split into
planes, most significant bits first, so a lower precision is a prefix of a higher one's record.
docs/codecs.md has the table of offsets.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from ..errors import InputError
from ..vocabulary import Precision

ALIGNMENT = 256
"""Start of each section: enough for every kernel and for a view of every dtype."""
HEADER_BYTES = 256
PARAMETER_BYTES = 2
"""A scale or a zero is a bfloat16."""
RAW_BITS = {Precision.FP32: 32, Precision.BF16: 16, Precision.FP16: 16}
PLANE_BITS = {
    Precision.INT8: (4, 2, 2),
    Precision.INT6: (4, 2),
    Precision.INT5: (4, 1),
    Precision.INT4: (4,),
    Precision.INT3: (2, 1),
    Precision.INT2: (2,),
}
BLOCK_CODES = 64
"""Codes that lie together in each plane: planes.py."""
GROUP_SIZES = (0, 32, 64, 128, 256)
"""Weights of a row that share a scale and a zero; 0: the whole row."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A precision and its group size. Raises InputError for a size that isn't offered."""

    precision: Precision
    group_size: int = 0

    def __post_init__(self) -> None:
        allowed = (0,) if self.is_raw else GROUP_SIZES
        if self.group_size not in allowed:
            raise InputError(
                f"group size {self.group_size} of {self.precision}: "
                f"allowed are {', '.join(map(str, allowed))} (0: one group per row)"
            )

    @property
    def is_raw(self) -> bool:
        """Whether weights are merely cast: no codes, scales or zeros."""
        return self.precision in RAW_BITS

    @property
    def bits(self) -> int:
        """Bits of a stored weight, scales and zeros not counted."""
        return RAW_BITS.get(self.precision) or sum(PLANE_BITS[self.precision])

    def layout(self, rows: int, cols: int) -> "RecordLayout":
        """Lay out the record of a rows x cols matrix; InputError for an empty one."""
        if rows < 1 or cols < 1:
            raise InputError(f"a matrix of {rows} x {cols} weights can't be encoded: both >= 1")
        return RecordLayout(codec=self, rows=rows, cols=cols, precision=self.precision)


DEFAULT_GROUP_SIZE = 64


def default_codec(precision: Precision) -> Codec:
    """Return the codec that plans use: int8 by rows, fewer bits by groups of 64."""
    by_rows = precision in RAW_BITS or precision is Precision.INT8
    return Codec(precision, 0 if by_rows else DEFAULT_GROUP_SIZE)


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane: ``bits`` of every code; row ``r`` starts at ``offset + r * row_bytes``."""

    bits: int
    offset: int
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """Places of a record's sections, in bytes from its start.

    ``codec`` made the record; ``precision`` is what is read of it (a prefix, or all of it).
    """

    codec: Codec
    rows: int
    cols: int
    precision: Precision

    @property
    def bits(self) -> int:
        """Bits of a code as read."""
        return Codec(self.precision, self.codec.group_size).bits

    @property
    def dropped_bits(self) -> int:
        """Low bits of the stored code that this prefix leaves away."""
        return self.codec.bits - self.bits

    @property
    def group_size(self) -> int:
        """Weights per group; the last group of a row may be shorter."""
        return self.codec.group_size or self.cols

    @property
    def padded_cols(self) -> int:
        """Codes stored per row: whole blocks."""
        return -(-self.cols // BLOCK_CODES) * BLOCK_CODES

    @property
    def num_groups(self) -> int:
        """Groups per row."""
        return 0 if self.codec.is_raw else -(-self.cols // self.group_size)

    @property
    def parameters_bytes(self) -> int:
        """Bytes of the scales, and of the zeros, without padding: (rows, num_groups) bfloat16."""
        return self.rows * self.num_groups * PARAMETER_BYTES

    @property
    def scales_offset(self) -> int:
        """Start of the scales."""
        return HEADER_BYTES

    @property
    def zeros_offset(self) -> int:
        """Start of the zeros: the value that the middle code stands for."""
        return self.scales_offset + _align(self.parameters_bytes)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes as far as they are read, most significant first."""
        return _planes(self)

    @property
    def num_bytes(self) -> int:
        """Length of the record, or of the prefix that is read."""
        last = self.planes[-1]
        return last.offset + _align(self.rows * last.row_bytes)

    def prefix(self, precision: Precision) -> "RecordLayout":
        """Return the layout that reads only the first planes: ``num_bytes`` of it are needed.

        Raises InputError where the planes of ``precision`` aren't the first of this codec.
        """
        own = PLANE_BITS.get(self.codec.precision, ())
        allowed = [
            str(lower) for lower, bits in PLANE_BITS.items() if bits == own[: len(bits)]
        ] or [str(self.codec.precision)]
        if str(precision) not in allowed:
            raise InputError(
                f"{precision} is not a prefix of a {self.codec.precision} record: allowed are "
                f"{', '.join(allowed)}"
            )
        return replace(self, precision=precision)

    def shard(self, start_row: int, end_row: int) -> "RecordLayout":
        """Return the layout of a record that holds these rows alone."""
        if not 0 <= start_row < end_row <= self.rows:
            raise InputError(f"rows {start_row} to {end_row} are outside 0 to {self.rows}")
        return replace(self, rows=end_row - start_row)

    def row_ranges(self, start_row: int, end_row: int) -> tuple[tuple[int, int, int], ...]:
        """Say which bytes make a record of some rows: (offset here, offset there, length) each.

        Copied to their place there, in a buffer of ``shard(start_row, end_row).num_bytes``, they
        decode like the record of these rows; its header isn't made by copying.
        """
        part = self.shard(start_row, end_row)
        parameter_row = self.num_groups * PARAMETER_BYTES
        sections = [
            (self.scales_offset, part.scales_offset, parameter_row),
            (self.zeros_offset, part.zeros_offset, parameter_row),
        ]
        for plane, there in zip(self.planes, part.planes, strict=True):
            sections.append((plane.offset, there.offset, plane.row_bytes))
        return tuple(
            (here + start_row * row_bytes, there, part.rows * row_bytes)
            for here, there, row_bytes in sections
            if row_bytes
        )


@lru_cache(1024)  # a model has few shapes, and asks often
def _planes(layout: RecordLayout) -> tuple[Plane, ...]:
    start = layout.zeros_offset + _align(layout.parameters_bytes)
    if layout.codec.is_raw:
        return (Plane(layout.bits, start, layout.cols * layout.bits // 8),)
    planes = []
    for bits in PLANE_BITS[layout.precision]:
        row_bytes = layout.padded_cols * bits // 8
        planes.append(Plane(bits, start, row_bytes))
        start += _align(layout.rows * row_bytes)
    return tuple(planes)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
