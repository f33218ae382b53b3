"""The operators ``torch.ops.tierhints``: products with records, lookups in them, their decoding;
and attention of one token for each sequence, which torch has no kernel for on a CPU.

torch.compile, torch.export and opcheck see them through their fakes. On a CPU the C++ extension
(``native``) computes them, on CUDA Triton (``triton_ops``), and where those can't be had the
reference in torch alone (``expansion``).
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .expansion import Expansion
from .layout import PLANE_BITS, Codec, RecordLayout
from .native import load_native
from .scratch import Scratch

_LAYOUT = "int rows, int cols, int group_size, int stored_bits, int bits"
_torch: Any = torch.library  # whose functions aren't typed
_LIBRARY = _torch.Library("tierhints", "DEF")
_LIBRARY.define(
    f"linear(Tensor x, Tensor record, Tensor? bias, {_LAYOUT}, int scratch_bytes) -> Tensor"
)
_LIBRARY.define(
    "linears(Tensor x, Tensor[] records, Tensor?[] biases, int[] rows, int cols, int group_size, "
    "int stored_bits, int bits, int scratch_bytes) -> Tensor"
)
_LIBRARY.define("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define(f"rows(Tensor ids, Tensor record, {_LAYOUT}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"decode(Tensor record, {_LAYOUT}, int start, int end, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor"
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
    """Have the operators computed on a kind of device; returns by what: "native" (C++), "triton" or
    "reference". Says once, in a warning, why the slow one is in use.
    """
    reason = ""
    if device_type == "cpu":
        native = load_native()
        if native.library is not None:
            return "native"
        reason = native.reason
    elif device_type == "cuda":
        try:
            from . import triton_ops
        except ImportError as error:
            reason = f"Triton can't be imported ({error})"
        else:
            _register(triton_ops.linear, triton_ops.look_up, triton_ops.decode, "CUDA")
            return "triton"
    if reason:
        warnings.warn(
            f"compressed weights compute slowly here, in torch alone: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )
    _register(_linear, _rows, _decode, device_type.upper())
    return "reference"


def _register(
    linear: Callable[..., Tensor],
    rows: Callable[..., Tensor],
    decode: Callable[..., Tensor],
    key: str,
) -> None:
    for name, function in (("linear", linear), ("rows", rows), ("decode", decode)):
        _LIBRARY.impl(name, function, key)


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


def _linears(
    x: Tensor,
    records: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    *layout: int,
) -> Tensor:
    """Return the products with several matrices beside each other: what the CPU's kernels make in
    one go, elsewhere one by one.
    """
    parts = zip(records, biases, rows, strict=True)
    linear = torch.ops.tierhints.linear
    return torch.cat([linear(x, record, bias, n, *layout) for record, bias, n in parts], -1)


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


def _linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by weights (rows, cols) as they are, in fp32."""
    added = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.float(), added).to(x.dtype)


def _fake_linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend with rows (B, groups, R, D) that share keys and values (B, groups, L, D) of a group.

    ``mask``: added to the scores, (B or 1, 1, 1, L). Returns (B, groups, R, D of values), 0 where
    all is masked.
    """
    scores = query @ key.transpose(-1, -2) * scale
    scores = scores if mask is None else scores + mask
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    return weights @ value


def _fake_attend(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _scratch_bytes(cols: int) -> int:
    return max(_EXPANSION_BYTES, 32 * cols + 4096)


def _fake_linear(x: Tensor, record: Tensor, bias: Tensor | None, rows: int, *others: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _fake_linears(
    x: Tensor, records: Any, biases: Any, rows: Sequence[int], *others: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(rows))


def _fake_rows(ids: Tensor, record: Tensor, rows: int, cols: int, *others: Any) -> Tensor:
    return record.new_empty(*ids.shape, cols, dtype=others[-1])


def _fake_decode(record: Tensor, rows: int, cols: int, *others: Any) -> Tensor:
    start, end, dtype = others[-3:]
    return record.new_empty(end - start, cols, dtype=dtype)


_LIBRARY.impl("linears", _linears, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_bf16", _linear_bf16, "CompositeExplicitAutograd")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
for _name, _fake in (
    ("linear", _fake_linear),
    ("linears", _fake_linears),
    ("rows", _fake_rows),
    ("decode", _fake_decode),
    ("linear_bf16", _fake_linear_bf16),
    ("attend", _fake_attend),
):
    _torch.register_fake(f"tierhints::{_name}", _fake)
