"""Parts: one parameter in a payload, raw or as a codec's record, and what its uses need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...codecs.kernels import Use
from ...codecs.records import Codec, RecordLayout
from ...codecs.storage import is_lossy, is_router, is_transposed, stored_form
from ...vocabulary import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One parameter in a payload. ``codec`` None: raw bytes in the memory order of the strides."""

    parameter: str
    expert: int | None
    """The number along dimension 0 of the one expert that it has of the parameter; None: all."""
    offset: int
    num_bytes: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    codec: Codec | None
    record: RecordLayout | None
    transposed: bool
    uses: frozenset[Use]
    rows: int
    """Of the weight as a matrix: output features, or vocabulary."""
    columns: int
    """Of the weight as a matrix: input features."""
    incompressible: bool
    """Compression was asked for, but its record would not be smaller."""
    expanded_bytes: int
    """Bytes for a use that can't compute with the record; 0 where all owners' uses can."""
    whole_bytes: int
    """Bytes for a use that can't compute with the record, or with shards of rows."""

    @property
    def num_native_bytes(self) -> int:
        """Bytes as a tensor of the parameter's own dtype."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Its memory is in the order of its dimensions."""
        return torch.empty(self.shape, device="meta").stride() == self.stride


def make_part(
    name: str,
    weight: Tensor,
    precision: Precision | None,
    owners: Sequence[nn.Module],
    offset: int,
    *,
    packed: bool,
    plain: bool = False,
    expert: int | None = None,
) -> Part:
    """Lay a parameter out. ``owners`` are the modules that it is registered in, the one of that
    name first; ``packed``: it holds experts, which are taken one at a time; ``plain``: its block
    takes nothing but plain weights; ``expert``: no more than this one's slice. ``precision`` None
    is lossless.
    """
    if expert is not None:
        weight = torch.empty(weight.shape[1:], dtype=weight.dtype, device="meta")
    owner = owners[0]
    form = stored_form(name, weight, owner, precision, is_expert=expert is not None)
    record = form.record if form else None
    native_bytes = weight.numel() * weight.element_size()
    rows, columns = math.prod(weight.shape[:-1]), weight.shape[-1] if weight.shape else 1
    if record is not None:
        rows, columns = record.rows, record.cols
    in_order = torch.empty(weight.shape, device="meta").stride() == weight.stride()
    whole_bytes = native_bytes if in_order and not (form and form.transposed) else 2 * native_bytes
    computes = record is None or (
        not plain and all(_computes_compressed(each, packed) for each in owners)
    )
    return Part(
        parameter=name,
        expert=expert,
        offset=offset,
        num_bytes=record.num_bytes if record else native_bytes,
        shape=weight.shape,
        stride=weight.stride(),
        dtype=weight.dtype,
        codec=form.codec if form else None,
        record=record,
        transposed=form is not None and form.transposed,
        uses=frozenset({Use.WHOLE}) if plain else frozenset(map(_use, owners)),
        rows=rows,
        columns=columns,
        incompressible=precision is not None
        and is_lossy(weight, precision)
        and record is None
        and not is_router(name, weight, owner),
        expanded_bytes=0 if computes else whole_bytes,
        whole_bytes=whole_bytes,
    )


def _use(owner: nn.Module) -> Use:
    """Say what a module does with a weight of its own."""
    if isinstance(owner, nn.Embedding):
        return Use.EMBEDDING
    plain = type(owner).forward is nn.Linear.forward
    if isinstance(owner, NonDynamicallyQuantizableLinear) or not (plain or is_transposed(owner)):
        return Use.WHOLE
    return Use.LINEAR


def _computes_compressed(owner: nn.Module, packed: bool) -> bool:
    """Say whether a module takes its weight by operations that a record has: matrix products,
    lookups, and single experts of packed ones.
    """
    if isinstance(owner, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention takes its weight, and doesn't call it
    taken = type(owner).forward in (nn.Linear.forward, nn.Embedding.forward)
    return taken or packed or is_transposed(owner)
