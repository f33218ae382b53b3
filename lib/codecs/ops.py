"""The operators ``torch.ops.tierhints``: products with records, lookups in them, their decoding.

torch.compile, torch.export and opcheck see them through their fakes. On a CPU the C++ extension
(``native``) computes them, and where it can't be had the reference in torch alone (``expansion``).
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .expansion import Expansion
from .layout import PLANE_BITS, Codec, RecordLayout
from .native import load_native
from .scratch import Scratch

_LAYOUT = "int rows, int cols, int group_size, int stored_bits, int bits"
_LIBRARY = torch.library.Library("tierhints", "DEF")  # noqa: TOR901
_LIBRARY.define(
    f"linear(Tensor x, Tensor record, Tensor? bias, {_LAYOUT}, int scratch_bytes) -> Tensor"
)
_LIBRARY.define(f"rows(Tensor ids, Tensor record, {_LAYOUT}, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    f"decode(Tensor record, {_LAYOUT}, int start, int end, ScalarType dtype) -> Tensor"
)
_PRECISIONS = {sum(bits): precision for precision, bits in PLANE_BITS.items()}
_EXPANSION_BYTES = 2**20
"""Scratch of the reference, where the operator has none."""

LayoutArguments = tuple[int, int, int, int, int]
"""Rows, columns, group size, bits as stored and as read."""


def layout_arguments(layout: RecordLayout) -> LayoutArguments:
    """Return a layout as the operators take it."""
    codec = layout.codec
    return layout.rows, layout.cols, codec.group_size, codec.bits, layout.bits


@cache
def prepare(device_type: str) -> str:
    """Have the operators computed on a kind of device; returns by what: "native" or "reference".
    Says once, in a warning, why the slow one is in use.
    """
    if device_type == "cpu":
        native = load_native()
        if native.library is not None:
            return "native"
        warnings.warn(
            f"compressed weights compute slowly here, in torch alone: {native.reason}",
            RuntimeWarning,
            stacklevel=3,
        )
    key = device_type.upper()
    _LIBRARY.impl("linear", _linear, key)
    _LIBRARY.impl("rows", _rows, key)
    _LIBRARY.impl("decode", _decode, key)
    return "reference"


def _open(
    record: Tensor, layout: LayoutArguments, dtype: torch.dtype, scratch_bytes: int
) -> Expansion:
    rows, cols, group_size, stored_bits, bits = layout
    whole = Codec(_PRECISIONS[stored_bits], group_size).layout(rows, cols)
    scratch = Scratch(scratch_bytes, record.device)
    return Expansion(record, whole.prefix(_PRECISIONS[bits]), dtype=dtype, scratch=scratch)


def _linear(
    x: Tensor,
    record: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    group_size: int,
    stored_bits: int,
    bits: int,
    scratch_bytes: int,
) -> Tensor:
    layout = rows, cols, group_size, stored_bits, bits
    return _open(record, layout, x.dtype, scratch_bytes).linear(x, bias)


def _rows(
    ids: Tensor,
    record: Tensor,
    rows: int,
    cols: int,
    group_size: int,
    stored_bits: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    layout = rows, cols, group_size, stored_bits, bits
    return _open(record, layout, dtype, _scratch_bytes(cols)).rows(ids)


def _decode(
    record: Tensor,
    rows: int,
    cols: int,
    group_size: int,
    stored_bits: int,
    bits: int,
    start: int,
    end: int,
    dtype: torch.dtype,
) -> Tensor:
    layout = rows, cols, group_size, stored_bits, bits
    return _open(record, layout, dtype, _scratch_bytes(cols)).expand(start, end)


def _scratch_bytes(cols: int) -> int:
    return max(_EXPANSION_BYTES, 32 * cols + 4096)


@torch.library.register_fake("tierhints::linear")
def _(x: Tensor, record: Tensor, bias: Tensor | None, rows: int, *others: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.register_fake("tierhints::rows")
def _(ids: Tensor, record: Tensor, rows: int, cols: int, *others: Any) -> Tensor:
    return record.new_empty(*ids.shape, cols, dtype=others[-1])


@torch.library.register_fake("tierhints::decode")
def _(record: Tensor, rows: int, cols: int, *others: Any) -> Tensor:
    start, end, dtype = others[-3:]
    return record.new_empty(end - start, cols, dtype=dtype)
