"""Triton kernels that compute from the bytes of a record. ``triton_ops`` launches them.

In the narrowest plane that is read a block of 64 codes has RUN bytes, each with a code of every
*piece* of the block: byte j with those of columns j, RUN + j, 2 RUN + j... (planes.py). A program
unpacks RUNS such blocks of a row at a time in registers, all their pieces, so each byte is loaded
once; planes are joined in words, four codes at a time. Tensors are (rows, RUNS, RUN): columns of a
piece share a group, so scales and zeros are loaded for runs, whatever the shape.

Integers that are 1 become constants when Triton compiles: they have no methods of tensors.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .layout import BLOCK_CODES, HEADER_BYTES

_HEADER = tl.constexpr(HEADER_BYTES)
_BLOCK = tl.constexpr(BLOCK_CODES)
_MAGIC = tl.constexpr(0x4B000000)
"""2**23 in float32: or-ed with a code it is 2**23 + code. GPUs convert integers slowly."""
_MAGIC_VALUE = tl.constexpr(float(2**23))


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is compiled for: how codes are joined and scaled.

    ``first``: bits of the first plane; ``rest``: of each of the ``num_rest`` others. The first one
    spreads the pieces over ``vectors`` bytes, RUN from each other. A weight is code * s *
    ``dropped`` + z + s * ``low``. ``group``: columns that share s and z, 0: all.
    """

    first: int
    rest: int
    num_rest: int
    group: int
    dropped: int
    low: float

    @property
    def pieces(self) -> int:
        """Codes in a byte of the narrowest plane."""
        return 8 // (self.rest or self.first)

    @property
    def run(self) -> int:
        """Bytes of a block in the narrowest plane: RUN."""
        return BLOCK_CODES // self.pieces

    @property
    def vectors(self) -> int:
        """Bytes of the first plane for a byte of the narrowest."""
        return self.pieces * self.first // 8


@triton.jit
def _words(record: tl.tensor, plane_at: tl.tensor, word: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """Load four bytes of a plane at once; ``word``: where they are in it."""
    plane = (record + plane_at).to(tl.pointer_type(tl.uint32))
    return tl.load(plane + word, mask=exists, other=0)


@triton.jit
def _rest(
    record: tl.tensor,
    second_at: tl.tensor,
    third_at: tl.tensor,
    number: tl.tensor,
    word: tl.tensor,
    exists: tl.tensor,
    FORM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load what further planes have of blocks, ``number`` of each; of those not read, anything."""
    at = number * (FORM.run // 4) + word
    second = at
    third = at
    if FORM.num_rest > 0:
        second = _words(record, second_at, at, exists)
    if FORM.num_rest > 1:
        third = _words(record, third_at, at, exists)
    return second, third


@triton.jit
def _move(
    packed: tl.tensor, here: tl.constexpr, there: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    """Move some bits of each byte of words from a place to another: a shift and a mask."""
    if here > there:
        packed >>= here - there
    if here < there:
        packed <<= there - here
    return packed & ((((1 << BITS) - 1) << there) * 0x01010101)


@triton.jit
def _value(code: tl.tensor) -> tl.tensor:
    """Return the lowest byte in fp32."""
    return ((code & 255) | _MAGIC).to(tl.float32, bitcast=True) - _MAGIC_VALUE


@triton.jit
def _weights(
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    column: tl.tensor,
    num_groups: tl.tensor,
    place: tl.constexpr,
    index: tl.constexpr,
    FORM: tl.constexpr,
) -> tl.tensor:
    """Decode a piece of a block of words, fp32 (rows, runs, run).

    It is at ``place`` in the bytes of the first plane, at ``index`` in those of the others.
    ``column``: the first of each run, (1, runs, 1). ``scales``, ``zeros``: each row's, (rows, 1,
    1).
    """
    below: tl.constexpr = FORM.rest * FORM.num_rest
    code = _move(first, 8 - FORM.first * (place + 1), below, FORM.first)
    if FORM.num_rest > 0:
        code |= _move(second, 8 - FORM.rest * (index + 1), below - FORM.rest, FORM.rest)
    if FORM.num_rest > 1:
        code |= _move(third, 8 - FORM.rest * (index + 1), 0, FORM.rest)
    even = tl.join(_value(code), _value(code >> 16))
    odd = tl.join(_value(code >> 8), _value(code >> 24))
    value = tl.join(even, odd).reshape(code.shape[0], code.shape[1], 4 * code.shape[2])
    group = column * 0
    if FORM.group:
        group = column // FORM.group
    exists = group < num_groups
    scale = tl.load(scales + group, mask=exists, other=0.0).to(tl.float32)
    zero = tl.load(zeros + group, mask=exists, other=0.0).to(tl.float32)
    return value * (scale * FORM.dropped) + (zero + scale * FORM.low)


@triton.jit
def multiply_few(
    x: tl.tensor,
    record: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    num_groups: tl.tensor,
    blocks: tl.tensor,
    zeros_at: tl.tensor,
    first_at: tl.tensor,
    second_at: tl.tensor,
    third_at: tl.tensor,
    FORM: tl.constexpr,
    X_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    LANE: tl.constexpr,
) -> None:
    """Multiply a block of weight rows by ``X_ROWS`` activation rows, a block of bytes at a time.

    ``LANE``: activations in 16 bytes.
    """
    VECTORS: tl.constexpr = FORM.vectors
    PLACES: tl.constexpr = 8 // FORM.first
    RUN: tl.constexpr = FORM.run
    WORDS: tl.constexpr = RUN // 4
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    held = tl.minimum(row, rows - 1).to(tl.int64)[:, None, None]
    scales = (record + _HEADER).to(tl.pointer_type(tl.bfloat16)) + held * num_groups
    zeros = (record + zeros_at).to(tl.pointer_type(tl.bfloat16)) + held * num_groups
    # A thread takes as many columns of weights as a load of activations gives it, or layouts
    # differ, and weights go from one to the other through shared memory.
    word = tl.max_contiguous(tl.arange(0, WORDS)[None, None, :], [1, 1, LANE // 4])
    in_run = tl.arange(0, RUN)[None, None, :]
    sums: tl.tuple = ()
    for _ in tl.static_range(X_ROWS):
        sums = sums + (tl.zeros((BLOCK_ROWS, RUNS, RUN), tl.float32),)
    for start in range(0, blocks, RUNS):
        block = start + tl.arange(0, RUNS)[None, :, None]
        exists = block < blocks
        number = held * blocks + block
        second, third = _rest(record, second_at, third_at, number, word, exists, FORM)
        for vector in tl.static_range(VECTORS):
            at = (number * VECTORS + vector) * WORDS
            first = _words(record, first_at, at + word, exists)
            for place in tl.static_range(PLACES):
                index = place * VECTORS + vector
                weights = _weights(
                    first,
                    second,
                    third,
                    scales,
                    zeros,
                    block * _BLOCK + index * RUN,
                    num_groups,
                    place,
                    index,
                    FORM,
                )
                # Activations are loaded for every row, for the same reason.
                column = block * _BLOCK + index * RUN + in_run
                column = tl.broadcast_to(column, (BLOCK_ROWS, RUNS, RUN))
                wanted = column < cols
                added: tl.tuple = ()
                for m in tl.static_range(X_ROWS):
                    values = tl.load(x + m * cols + column, mask=wanted, other=0.0)
                    added = added + (sums[m] + weights * values.to(tl.float32),)
                sums = added
    for m in tl.static_range(X_ROWS):
        total = tl.sum(tl.sum(sums[m], 2), 1)
        if bias is not None:
            total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(y + m * rows + row, total.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def multiply_tiles(
    x: tl.tensor,
    record: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    x_rows: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    num_groups: tl.tensor,
    blocks: tl.tensor,
    zeros_at: tl.tensor,
    first_at: tl.tensor,
    second_at: tl.tensor,
    third_at: tl.tensor,
    FORM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """Multiply a block of weight rows by a block of activation rows, y transposed."""
    VECTORS: tl.constexpr = FORM.vectors
    PLACES: tl.constexpr = 8 // FORM.first
    RUN: tl.constexpr = FORM.run
    WORDS: tl.constexpr = RUN // 4
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    held = tl.minimum(row, rows - 1).to(tl.int64)[:, None, None]
    x_start = tl.minimum(m, x_rows - 1).to(tl.int64)[None, :] * cols
    scales = (record + _HEADER).to(tl.pointer_type(tl.bfloat16)) + held * num_groups
    zeros = (record + zeros_at).to(tl.pointer_type(tl.bfloat16)) + held * num_groups
    word = tl.arange(0, WORDS)[None, None, :]
    flat = tl.arange(0, RUNS * RUN)[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_X), tl.float32)
    for start in range(0, blocks, RUNS):
        block = start + tl.arange(0, RUNS)[None, :, None]
        exists = block < blocks
        number = held * blocks + block
        second, third = _rest(record, second_at, third_at, number, word, exists, FORM)
        for vector in tl.static_range(VECTORS):
            at = (number * VECTORS + vector) * WORDS
            first = _words(record, first_at, at + word, exists)
            for place in tl.static_range(PLACES):
                index = place * VECTORS + vector
                weights = _weights(
                    first,
                    second,
                    third,
                    scales,
                    zeros,
                    block * _BLOCK + index * RUN,
                    num_groups,
                    place,
                    index,
                    FORM,
                )
                weights = tl.reshape(weights, (BLOCK_ROWS, RUNS * RUN))
                column = (start + flat // RUN) * _BLOCK + index * RUN + flat % RUN
                wanted = column < cols
                values = tl.load(x + x_start + column, mask=wanted, other=0.0)
                total = tl.dot(weights.to(OPERAND), values.to(OPERAND), total)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    target = y + m.to(tl.int64)[None, :] * rows + row[:, None]
    kept = (row < rows)[:, None] & (m < x_rows)[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=kept)


@triton.jit
def decode_rows(
    ids: tl.tensor,
    start_row: tl.tensor,
    num_rows: tl.tensor,
    record: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    num_groups: tl.tensor,
    blocks: tl.tensor,
    zeros_at: tl.tensor,
    first_at: tl.tensor,
    second_at: tl.tensor,
    third_at: tl.tensor,
    FORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    RUNS: tl.constexpr,
) -> None:
    """Decode a block of bytes of a block of rows, to where they belong in ``out``."""
    VECTORS: tl.constexpr = FORM.vectors
    PLACES: tl.constexpr = 8 // FORM.first
    RUN: tl.constexpr = FORM.run
    WORDS: tl.constexpr = RUN // 4
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    kept = (row < num_rows)[:, None, None]
    held = tl.minimum(row, num_rows - 1).to(tl.int64) + start_row
    known = held >= 0
    if ids is not None:
        held = tl.load(ids + held).to(tl.int64)
        known = (held >= 0) & (held < rows)
        held = tl.where(known, held, 0)
    known = known[:, None, None]
    held = held[:, None, None]
    scales = (record + _HEADER).to(tl.pointer_type(tl.bfloat16)) + held * num_groups
    zeros = (record + zeros_at).to(tl.pointer_type(tl.bfloat16)) + held * num_groups
    word = tl.arange(0, WORDS)[None, None, :]
    target = out + row.to(tl.int64)[:, None, None] * cols
    block = tl.program_id(1) * RUNS + tl.arange(0, RUNS)[None, :, None]
    exists = block < blocks
    number = held * blocks + block
    second, third = _rest(record, second_at, third_at, number, word, exists, FORM)
    for vector in tl.static_range(VECTORS):
        at = (number * VECTORS + vector) * WORDS
        first = _words(record, first_at, at + word, exists)
        for place in tl.static_range(PLACES):
            index = place * VECTORS + vector
            weights = _weights(
                first,
                second,
                third,
                scales,
                zeros,
                block * _BLOCK + index * RUN,
                num_groups,
                place,
                index,
                FORM,
            )
            column = block * _BLOCK + index * RUN + tl.arange(0, RUN)[None, None, :]
            wanted = kept & (column < cols)
            weights = tl.where(known, weights, float("nan"))
            tl.store(target + column, weights.to(out.dtype.element_ty), mask=wanted)
