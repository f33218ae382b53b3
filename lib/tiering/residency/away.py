"""What stands behind a parameter whose weights are away, or held compressed: how an operation gets
them as a tensor, and how a caller gets a copy to keep.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from ..payload.contents import part_view
from ..payload.parts import Part
from ..transfer.transport import Left
from .casting import UnkeptCopies, autocast_dtype, copy_bytes
from .fast_memory import Want
from .rowwise import StreamedRows, reads_apart
from .stand_ins import Away, WeightOps, plain_tensors, set_weights

if TYPE_CHECKING:
    from .held import HeldGroup

_STEP_BYTES, _ROW_BLOCK = 2**20, 64
"""Weights, and a multiple of rows, that are expanded at a time: packed codes come in blocks."""


class AwayWeights:
    """One parameter's weights, away in its group."""

    def __init__(
        self, group: "HeldGroup", part: Part, shape: Tensor, ops: WeightOps | None
    ) -> None:
        self.group = group
        self.part = part
        self.shape = shape
        self.ops = ops
        self.transposed = part.transposed

    def prepare(self, whole: Sequence[Away], by_rows: Sequence[Away]) -> bool:
        """Make room for what an operation needs of this runtime's weights."""
        memory = self.group.memory
        ours, rows = (
            [each for each in some if isinstance(each, AwayWeights) and each.group.memory is memory]
            for some in (whole, by_rows)
        )
        groups = [each.group for each in (*ours, *rows)]
        with memory.watcher.alone():
            return memory.ensure_room(partial(look, groups, ours))

    @contextlib.contextmanager
    def fetch(self) -> Iterator[None]:
        """Make the parameter a plain one for an operation that can't do with less."""
        group, part, memory = self.group, self.part, self.group.memory
        group.refuse_written()
        with contextlib.ExitStack() as stack:
            stack.enter_context(memory.watcher.alone())
            if group.units and not group.by_rows:
                moved = stack.enter_context(memory.watcher.moving(group.name))
                if not group.is_routed:
                    memory.watcher.used(group.name)
                moved(group.acquire())
                stack.callback(group.release)
            if group.weights.is_away(part):
                ops = group.weights.ops(part)
                if is_put_together(self):
                    self._put_together(ops, stack)
                else:
                    buffer = stack.enter_context(StreamedRows(group).hold(0, shared=True))
                    set_weights(group.weights.parameter(part), part_view(buffer, part))
                stack.callback(group.weights.take_away, part, ops)
            if (dtype := autocast_dtype(memory.device)) is not None:
                stack.enter_context(UnkeptCopies())
                memory.book_moment(copy_bytes(group.payload, [dtype], whole=True))
            yield

    def copy(self) -> Tensor | None:
        """Read weights that are away into memory that the caller keeps; a tied parameter, and a
        second caller meanwhile, get the same. Later writes show in the parameter's counter.
        """
        group, part, memory = self.group, self.part, self.group.memory
        if not group.units or part.record is not None:
            return None
        group.refuse_written()
        with contextlib.ExitStack() as stack:
            stack.enter_context(plain_tensors())
            stack.enter_context(DisableTorchFunctionSubclass())
            kept = group.copies.get(part.parameter, lambda: None)()
            alias = group.weights.parameter(part).detach()
            if kept is not None and kept.device == memory.copy_device:
                alias.data = kept
                return alias
            moved = stack.enter_context(memory.watcher.moving(group.name))
            alias.data = group.read_copy(part, memory.copy_device)
            memory.charges.fetch(group.units[0].tier, part.num_bytes)
            moved(part.num_bytes)
        group.copies[part.parameter] = weakref.ref(alias)
        return alias

    def _put_together(self, ops: WeightOps, stack: contextlib.ExitStack) -> None:
        """Make the weights in memory of their own, which counts until ``stack`` ends."""
        part, memory = self.part, self.group.memory
        expanded: list[Left] = []
        stack.enter_context(memory.taking(part.num_native_bytes, expanded))
        with plain_tensors():
            matrix = _expand_whole(ops, part, memory.device)
            if part.whole_bytes == part.num_native_bytes:
                weights = matrix.view(part.shape)
            else:  # both are there for a moment
                with memory.taking(part.num_native_bytes):
                    weights = _in_shape(matrix, part)
            set_weights(self.group.weights.parameter(part), weights)
            expanded.append(Left(weights))


def look(groups: "Sequence[HeldGroup]", whole: Sequence[AwayWeights]) -> Want:
    """Return what groups, and weights that are needed as tensors, want as they are held now."""
    away = [each for each in whole if each.group.weights.is_away(each.part)]
    in_slot = {id(each.group) for each in away if not is_put_together(each)}
    units = {
        max(group.units, key=lambda unit: unit.num_bytes)
        for group in groups
        if group.units
        and not group.is_routed
        and (group.by_rows or not group.num_holds)
        and (id(group) in in_slot or not reads_apart(group))
    }
    expanded = {
        each.part.parameter: each.part.whole_bytes for each in away if is_put_together(each)
    }
    return Want(
        groups=frozenset(group.name for group in groups),
        whole=frozenset(each.part.parameter for each in away),
        units=frozenset(units),
        expanded_bytes=sum(expanded.values()),
    )


def is_put_together(away: AwayWeights) -> bool:
    """Say whether whole weights get memory of their own, and are no view of a slot."""
    return away.part.record is not None or len(away.group.units) > 1


def _expand_whole(ops: WeightOps, part: Part, device: torch.device) -> Tensor:
    """Return a whole weight as a matrix, made a few rows at a time: what that takes is small."""
    step = max(_STEP_BYTES // (part.columns * _ROW_BLOCK), 1) * _ROW_BLOCK
    if part.rows <= step:
        return ops.expand(0, part.rows)
    matrix = torch.empty(part.rows, part.columns, dtype=part.dtype, device=device)
    for start in range(0, part.rows, step):
        end = min(start + step, part.rows)
        matrix[start:end] = ops.expand(start, end)
    return matrix


def _in_shape(matrix: Tensor, part: Part) -> Tensor:
    """Return a decoded matrix as the parameter was: its shape and strides."""
    weights = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device=matrix.device)
    return weights.copy_(matrix.t() if part.transposed else matrix.view(part.shape))
