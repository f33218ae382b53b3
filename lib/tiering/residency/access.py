"""Access: what a group's parameters are while its weights are in use, and what stands for them
while they are away.

In use they are views of a slot, or their own weights; away they are zero-size stand-ins
(``offloaded``) that fetch what an operation needs. What is written to a stand-in has nowhere to go:
such writes show in its version counter, which aliases share, and the group is then refused.
"""

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from ...codecs.kernels import CompressedWeight, EncodedWeight, Scratch, Use
from ...errors import PlacementError
from ...units import format_bytes
from ...vocabulary import Tier
from ..payload.contents import part_view
from ..payload.layout import Payload
from ..payload.parts import Part
from ..transfer.link import Left, Link, Unit
from ..transfer.prefetch import Prefetcher
from .archive import Archive, Stored
from .casting import UnkeptCopies, autocast_dtype, copy_bytes
from .originals import Originals
from .reader import GroupReader, expand_whole, in_shape, plain_tensors, rows_apart
from .rowwise import StreamedRows
from .stand_ins import OffloadedParameter, WeightOps, set_away, set_weights


@dataclass(slots=True, eq=False)
class Held:
    """A group as it is held now."""

    payload: Payload
    tier: Tier | None = None
    """Where the plan has put it; None before the first plan."""
    units: tuple[Unit, ...] = ()
    """What moves of it; empty while it resides in fast memory."""
    num_holds: int = 0
    resident: dict[str, CompressedWeight] = field(default_factory=dict)
    """Compressed weights in fast memory, by parameter."""
    stored: Stored | None = None
    """Where its payload is, once it has been stored."""
    versions: list[int] = field(default_factory=list)
    """Of its parameters when they were last placed, to notice writes."""
    copies: dict[str, weakref.ref[Tensor]] = field(default_factory=dict)
    """What was last given out, to be kept, of parameters that are away."""
    digest: str | None = None
    """Of a checkpoint's weights as they came into fast memory."""
    native: tuple[Stored, Payload] | None = None
    """Where the original weights are once they are nowhere in memory."""

    @property
    def by_rows(self) -> bool:
        """It moves in shards, at the request of operations and not of its module's hooks."""
        return bool(self.units) and self.payload.by_rows

    @property
    def writable(self) -> bool:
        """Its weights are in fast memory as they are: what is written to them stays."""
        return not self.units and not self.payload.lossy


OnMove = Callable[[str], contextlib.AbstractContextManager[Callable[[int], None]]]
MakeRoom = Callable[[Collection[str], Collection[str]], None]


def refuse_more(groups: Collection[str], whole: Collection[str]) -> None:
    """Refuse to make room."""
    raise PlacementError(f"there is no room for weights of {', '.join(sorted(groups))}")


class Access:
    """Gives groups their weights for as long as they are used. One thread at a time."""

    def __init__(
        self, originals: Originals, archive: Archive, link: Link, device: torch.device
    ) -> None:
        self.originals = originals
        self.archive = archive
        self.link = link
        self.device = device
        self.prefetcher = Prefetcher(link, 0, [])
        self.copy_device = device
        """Where copies of weights go that somebody keeps."""
        self.scratch: Scratch | None = None
        """Working memory for compressed weights."""
        self.lookup = torch.empty(0, dtype=torch.uint8)
        """The buffer of lookups in embeddings that are away."""
        self.on_extra: Callable[[int], None] = lambda num_bytes: None
        """Told of fast memory taken (or, negative, given back) beyond the plan's."""
        self.alone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Entered for as long as an operation outside a module's own hooks has weights: keeps other
        threads from slots and scratch.
        """
        self.on_move: OnMove = lambda group: contextlib.nullcontext(lambda num_bytes: None)
        """Entered around each transfer outside a module's own hooks; told the bytes that moved."""
        self.on_use: Callable[[str], None] = lambda group: None
        """Told of each full use that comes from an operation and not from a module's hooks."""
        self.make_room: MakeRoom = refuse_more
        """Asked where the plan has no room for groups and whole parameters at the same time."""
        self.spare_bytes: Callable[[], int | None] = lambda: None
        """Returns the fast memory that is left for what is expanded; None: there is no limit."""
        self.explain: Callable[[], str] = str
        """Returns why no plan within the budget is enough, with the budget that is."""
        self._left: list[Left] = []
        """Expanded weights of which an operation has left views behind."""
        self._places: dict[int, tuple[Held, Part]] = {}
        """Groups and parts of the parameters that are away, by identity."""

    def parameter(self, part: Part) -> nn.Parameter:
        """Return the model's own parameter."""
        return self.originals.parameters[part.parameter]

    @contextlib.contextmanager
    def copies_on_host(self) -> Iterator[None]:
        """Read what somebody keeps into host memory for a while: it may be the whole model."""
        self.copy_device = torch.device("cpu")
        try:
            yield
        finally:
            self.copy_device = self.device

    def acquire(self, held: Held) -> int:
        """Bring a group's weights into fast memory; returns the bytes moved. Nests.

        Blocks until they are there. Raises PlacementError where the stored bytes are not sound, and
        where something was written to the weights while they were away.
        """
        if not held.units:
            self.link.use_in_place(held.payload.data_bytes)
        self.refuse_written(held)
        self._ensure_room([held], [])
        if not held.units or held.by_rows:
            return 0
        held.num_holds += 1  # first: whoever is interrupted below is found by end_holds
        if held.num_holds > 1:
            return 0
        try:
            return self._fetch(held)
        except Exception:
            held.num_holds -= 1
            raise

    def hold_again(self, held: Held, num_holds: int) -> None:
        """Go on with holds after groups have moved during a forward."""
        if held.units and not held.by_rows:
            held.num_holds = num_holds
            self._fetch(held)

    def _fetch(self, held: Held) -> int:
        unit = held.units[0]
        with plain_tensors():
            buffer = self.prefetcher.acquire(unit)
            self._show(held, self._in_memory(held, 0) if buffer is None else buffer)
        return unit.data_bytes

    def _prepare(
        self, whole: Sequence[OffloadedParameter], by_rows: Sequence[OffloadedParameter]
    ) -> bool:
        """Make room for an operation; returns whether anything has moved for it."""
        places = [self._places[id(parameter)] for parameter in whole]
        groups = [held for held, _ in places]
        groups += [self._places[id(parameter)][0] for parameter in by_rows]
        with self.alone():
            return self._ensure_room(groups, places)

    def _ensure_room(self, groups: Sequence[Held], whole: Sequence[tuple[Held, Part]]) -> bool:
        """Ask for a plan with room for groups and whole parameters, where this one has none."""
        if self._has_room(groups, whole):
            return False
        names = {held.payload.group.name for held in groups}
        self.make_room(names, {part.parameter for _, part in whole})
        gone = [(held, part) for held, part in whole if self._is_away(part)]
        if not self._has_room(groups, gone):
            raise PlacementError(
                f"there is no room for offloaded weights of {', '.join(sorted(names))} beside what "
                f"others have kept views of: {self.explain()}"
            )
        return True

    def _has_room(self, groups: Sequence[Held], whole: Sequence[tuple[Held, Part]]) -> bool:
        in_slot = {id(held) for held, part in whole if not _is_put_together(held, part)}
        units = {
            max(held.units, key=lambda unit: unit.num_bytes)
            for held in groups
            if held.units
            and (held.by_rows or not held.num_holds)
            and (id(held) in in_slot or not self._reads_apart(held))
        }
        self.sweep()
        spare = self.spare_bytes()
        expanded = {
            part.parameter: part.whole_bytes for held, part in whole if _is_put_together(held, part)
        }
        fits = spare is None or sum(expanded.values()) <= spare
        return fits and self.prefetcher.has_room(units)

    def _reads_apart(self, held: Held) -> bool:
        """Say whether all of a group can be had without a slot, in the buffer of lookups."""
        part = held.payload.parts[0]
        if not held.by_rows or Use.EMBEDDING not in part.uses or not len(self.lookup):
            return False
        return part.record is not None or rows_apart(part, held.payload.shards) > 0

    def _is_away(self, part: Part) -> bool:
        return isinstance(self.parameter(part), OffloadedParameter)

    def release(self, held: Held) -> None:
        """End one use; nothing is copied back, since weights don't change."""
        if held.num_holds == 0:
            return
        held.num_holds -= 1
        if held.num_holds == 0:
            with plain_tensors():
                self.hide(held)
            self.prefetcher.release(held.units[0], shared=True)

    def hide(self, held: Held) -> None:
        """Take a group's weights from its parameters; weights by rows keep their operations."""
        for part in held.payload.parts:
            ops = None
            if held.by_rows:
                ops = StreamedRows(
                    GroupReader(self, held),
                    held.payload.shards,
                    part.columns,
                    part.dtype,
                    self.scratch,
                )
            self._take_away(held, part, ops)

    def reside(self, held: Held, part: Part, weight: CompressedWeight) -> None:
        """Let a compressed weight in fast memory stand for a parameter."""
        held.resident[part.parameter] = weight
        self._take_away(held, part, weight)

    def was_written(self, held: Held) -> bool:
        """Say whether a parameter, or an alias of it, was written to since it was placed."""
        return self.versions(held) != held.versions

    def versions(self, held: Held) -> list[int]:
        """Return the version counters of a group's parameters."""
        with DisableTorchFunctionSubclass():
            return [self.parameter(part)._version for part in held.payload.parts]

    def refuse_written(self, held: Held) -> None:
        """Raise PlacementError where a write to weights that are away was lost."""
        if not held.writable and self.was_written(held):
            raise PlacementError(
                f"weights of {held.payload.group.name} were written to while they were away, and "
                "what was written is lost: detach, change the model, and attach again"
            )

    def _show(self, held: Held, buffer: Tensor) -> None:
        """Make a group's parameters views of its bytes in a slot."""
        for part in held.payload.parts:
            if part.record is None:
                set_weights(self.parameter(part), part_view(buffer, part))
            else:
                assert self.scratch is not None
                record = buffer[part.offset : part.offset + part.num_bytes]
                weight = EncodedWeight(record, part.record, dtype=part.dtype, scratch=self.scratch)
                self._take_away(held, part, weight)

    def _take_away(self, held: Held, part: Part, ops: WeightOps | None) -> None:
        self._places[id(self.parameter(part))] = held, part
        set_away(
            self.parameter(part),
            self.originals.shapes[part.parameter],
            lambda: self._whole(held, part),
            ops,
            copy=partial(self._copy, held, part) if held.units and part.record is None else None,
            placeholder=torch.empty(0, dtype=part.dtype, device=self.device),
            transposed=part.transposed,
            prepare=self._prepare,
        )

    def _copy(self, held: Held, part: Part) -> Tensor:
        """Read a weight that is away for somebody who keeps it; parameters that are tied, and who
        asks again meanwhile, get the same memory. Later writes show in the parameter's counter.
        """
        self.refuse_written(held)
        name, unit = part.parameter, held.units[0]
        with contextlib.ExitStack() as stack:
            stack.enter_context(plain_tensors())
            stack.enter_context(DisableTorchFunctionSubclass())
            kept = held.copies.get(name, lambda: None)()
            alias = self.parameter(part).detach()
            if kept is not None and kept.device == self.copy_device:
                alias.data = kept
                return alias
            moved = stack.enter_context(self.on_move(unit.group))
            assert held.stored is not None
            alias.data = self.archive.copy(held.stored, held.payload, part, self.copy_device)
            self.link.fetch(unit.tier, part.num_bytes)
            moved(part.num_bytes)
        held.copies[name] = weakref.ref(alias)
        return alias

    @contextlib.contextmanager
    def _whole(self, held: Held, part: Part) -> Iterator[None]:
        """Make one parameter a plain one for an operation that can't do with less."""
        name, parameter = held.payload.group.name, self.parameter(part)
        self.refuse_written(held)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.alone())
            if held.units and not held.by_rows:
                moved = stack.enter_context(self.on_move(name))
                self.on_use(name)
                moved(self.acquire(held))
                stack.callback(self.release, held)
            if isinstance(parameter, OffloadedParameter):
                ops = parameter._tierhints_ops
                assert ops is not None
                if not _is_put_together(held, part):
                    buffer = stack.enter_context(GroupReader(self, held).hold(0, shared=True))
                    set_weights(parameter, part_view(buffer, part))
                else:
                    self._put_together(part, ops, stack)
                stack.callback(self._take_away, held, part, ops)
            if (dtype := autocast_dtype(self.device)) is not None:
                stack.enter_context(UnkeptCopies())
                copied = copy_bytes(held.payload, [dtype], whole=True)
                self.on_extra(copied)
                self.on_extra(-copied)
            yield

    def _put_together(self, part: Part, ops: WeightOps, stack: contextlib.ExitStack) -> None:
        """Make a parameter's weights in memory of their own, which counts until ``stack`` ends."""
        expanded: list[Left] = []
        stack.enter_context(self._taking(part.num_native_bytes, expanded))
        with plain_tensors():
            matrix = expand_whole(ops, part, self.device)
            if part.whole_bytes == part.num_native_bytes:
                weights = matrix.view(part.shape)
            else:  # both are there for a moment
                with self._taking(part.num_native_bytes):
                    weights = in_shape(matrix, part)
            set_weights(self.parameter(part), weights)
            expanded.append(Left(weights))

    @contextlib.contextmanager
    def _taking(self, num_bytes: int, expanded: Sequence[Left] = ()) -> Iterator[None]:
        """Take fast memory beyond slots and residents; raises PlacementError above the budget. What
        others have views of then (``expanded``) stays taken for as long as they do.
        """
        spare = self.spare_bytes()
        if spare is not None and num_bytes > spare:
            raise PlacementError(
                f"{format_bytes(num_bytes)} of expanded weights would pass the HBM budget, "
                f"of which {format_bytes(max(spare, 0))} are left: give a larger one"
            )
        self.on_extra(num_bytes)
        try:
            yield
        finally:
            self._left += expanded
            if not expanded:
                self.on_extra(-num_bytes)
            self.sweep()

    def sweep(self) -> None:
        """Give back the memory of expanded weights that nobody has views of any more."""
        gone = sum(left.num_bytes for left in self._left if left.is_free)
        self._left = [left for left in self._left if not left.is_free]
        if gone:
            self.on_extra(-gone)

    def left_bytes(self) -> int:
        """Return the fast memory of which only views that others have kept are left."""
        lent = len(self.prefetcher.lent) * self.prefetcher.slot_bytes
        return self.link.left_bytes() + lent

    def _in_memory(self, held: Held, index: int) -> Tensor:
        """Return a shard where it is kept in memory, as in emulation."""
        assert held.stored is not None
        view, shard = self.archive.view(held.stored), held.payload.shards[index]
        assert view is not None
        return view[shard.offset : shard.offset + shard.num_bytes]

    def _read_rows(self, held: Held, index: int, ids: Tensor) -> tuple[Tensor, int]:
        """Read rows of a shard into memory of their own; returns them and the bytes that moved."""
        shard, part = held.payload.shards[index], held.payload.parts[0]
        assert held.stored is not None
        if shard.record is None:
            rows, moved = self.archive.raw_rows(held.stored, part, shard, ids, self.lookup)
            return rows.to(self.device), moved
        assert self.scratch is not None
        record = self.archive.shard_record(held.stored, shard, self.lookup).to(self.device)
        weight = EncodedWeight(record, shard.record, dtype=part.dtype, scratch=self.scratch)
        return weight.rows(ids), shard.data_bytes


def _is_put_together(held: Held, part: Part) -> bool:
    """Say whether a whole weight gets memory of its own, and is no view of a slot."""
    return part.record is not None or len(held.units) > 1
