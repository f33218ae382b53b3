"""What a runtime did: per block calls, bytes moved, seconds of transfer and of compute, and
resident bytes over time.

Time is kept as marks: each mark closes the interval since the last one and books it to the block
that owned it, so that nested blocks (experts inside an MLP) are counted once. On a GPU a mark is a
CUDA event, read when the figures are asked for: nothing waits for the device while the model runs.
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

_TIMELINE_LIMIT = 20_000
_MAX_OPEN_MARKS = 4_096
"""CUDA events kept before they are read; reading them waits for the device once."""


@dataclass(slots=True, kw_only=True)
class BlockStats:
    """One block's share, while it moves (in emulation always): what resides in fast memory runs as
    without a runtime, and nothing of that is counted. Seconds are measured, or charged where a
    virtual clock is used.
    """

    tier: str
    num_bytes: int
    calls: int = 0
    bytes_moved: int = 0
    transfer_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class ExpertStats:
    """Experts that are below, in decoding: ``uses``, of which ``resident`` were in fast memory
    without having been read ahead, and ``ready`` were there when they were needed.

    ``cache_bytes``: beside them the plan has one or two experts' bytes to pass others through.
    ``reads`` are of what was missing, ``predicted`` ahead of need: ``useful`` were used by the next
    call of their layer, ``wasted`` not. Of ``foreseen_uses``, those of layers whose routing was
    predicted, ``named`` were in the prediction. ``prompt_reads`` are those of prompts.
    """

    cache_bytes: int
    uses: int
    resident: int
    ready: int
    reads: int
    predicted: int
    useful: int
    wasted: int
    foreseen_uses: int
    named: int
    prompt_reads: int


@dataclass(slots=True, kw_only=True)
class Stats:
    """A snapshot of a runtime's telemetry since attach or the last reset. Resident bytes are
    weights in fast memory. ``transfer_seconds`` were waited for what was on its way;
    ``link_seconds`` is for how long anything was; copies from host memory to a GPU aren't counted.
    """

    mode: str
    clock: str
    forwards: int
    bytes_per_tier: dict[str, int]
    bytes_moved: int
    transfer_seconds: float
    link_seconds: float
    compute_seconds: float
    resident_bytes: int
    peak_resident_bytes: int
    blocks: dict[str, BlockStats]
    timeline: list[tuple[float, int]]
    wait_error: dict[str, float] | None = None
    experts: ExpertStats | None = None
    """None where no experts are below."""

    @property
    def hidden_seconds(self) -> float:
        """Of the link's time what was not waited for."""
        return max(0.0, self.link_seconds - self.transfer_seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the snapshot as plain JSON types."""
        return asdict(self)


@dataclass(slots=True)
class Recorder:
    """Collects marks and byte counts for one runtime; not thread-safe by itself (the runtime holds
    a lock).
    """

    device: torch.device
    blocks: dict[str, BlockStats]
    resident_bytes: int
    forwards: int = 0
    peak_resident_bytes: int = 0
    link_seconds: float = 0.0
    timeline: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=_TIMELINE_LIMIT)
    )
    _owners: list[tuple[str, str] | None] = field(default_factory=lambda: [None])
    _start: float = field(default_factory=time.perf_counter)
    _last: float = field(default_factory=time.perf_counter)
    _marks: list[tuple[torch.cuda.Event, tuple[str, str] | None]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget all figures but the resident bytes."""
        self._settle()
        for name, block in self.blocks.items():
            self.blocks[name] = BlockStats(tier=block.tier, num_bytes=block.num_bytes)
        self.forwards, self.link_seconds = 0, 0.0
        self.timeline.clear()
        self._start = self._last = time.perf_counter()
        self.peak_resident_bytes = 0
        self.change_resident(0)

    def begin_transfer(self, block: str, *, counts: bool = True) -> None:
        """Enter a block: what follows is its transfer. ``counts``: it is a call of the block,
        too.
        """
        self._mark()
        self._owners.append(("transfer", block))
        self.blocks[block].calls += counts

    def count_call(self, block: str) -> None:
        """Count a use of a block that is moved with another."""
        self.blocks[block].calls += 1

    def end_transfer(self, block: str, moved_bytes: int, charged_seconds: float) -> None:
        """What follows is the block's compute; ``charged_seconds`` is virtual time that no clock
        saw.
        """
        self._mark()
        self._owners[-1] = ("compute", block)
        self.blocks[block].bytes_moved += moved_bytes
        self.blocks[block].transfer_seconds += charged_seconds

    def end_compute(self) -> None:
        """Leave the block that was entered last."""
        self._mark()
        self._owners.pop()

    def leave_all(self) -> None:
        """Leave whatever an interrupted forward was in."""
        if len(self._owners) > 1:
            self._mark()
            del self._owners[1:]

    def change_resident(self, num_bytes: int) -> None:
        """Book weight bytes that appeared in (or, negative, left) fast memory."""
        self.resident_bytes += num_bytes
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)
        self.timeline.append((time.perf_counter() - self._start, self.resident_bytes))

    def book_moment(self, num_bytes: int) -> None:
        """Book weight bytes that are in fast memory, beside what is there, for an operation."""
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes + num_bytes)

    def snapshot(
        self,
        *,
        mode: str,
        clock: str,
        wait_error: dict[str, float] | None,
        bytes_per_tier: dict[str, int],
        experts: ExpertStats | None = None,
    ) -> Stats:
        """Return the figures so far; on a GPU this waits for the device."""
        self._settle()
        blocks = {name: BlockStats(**asdict(block)) for name, block in self.blocks.items()}
        return Stats(
            mode=mode,
            clock=clock,
            forwards=self.forwards,
            bytes_per_tier=bytes_per_tier,
            bytes_moved=sum(block.bytes_moved for block in blocks.values()),
            transfer_seconds=sum(block.transfer_seconds for block in blocks.values()),
            link_seconds=self.link_seconds,
            compute_seconds=sum(block.compute_seconds for block in blocks.values()),
            resident_bytes=self.resident_bytes,
            peak_resident_bytes=self.peak_resident_bytes,
            blocks=blocks,
            timeline=list(self.timeline),
            wait_error=wait_error,
            experts=experts,
        )

    def _mark(self) -> None:
        owner = self._owners[-1]
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append((event, owner))
            if len(self._marks) > _MAX_OPEN_MARKS:
                self._settle()
            return
        now = time.perf_counter()
        self._book(owner, now - self._last)
        self._last = now

    def _settle(self) -> None:
        """Read the open CUDA marks, keeping the last one as the start of the next interval."""
        if not self._marks:
            return
        self._marks[-1][0].synchronize()
        for (earlier, _), (later, owner) in zip(self._marks, self._marks[1:], strict=False):
            self._book(owner, earlier.elapsed_time(later) * 1e-3)
        del self._marks[:-1]

    def _book(self, owner: tuple[str, str] | None, seconds: float) -> None:
        if owner is None:
            return
        kind, name = owner
        block = self.blocks[name]
        if kind == "transfer":
            block.transfer_seconds += seconds
        else:
            block.compute_seconds += seconds


def transfer_ms(stats: Mapping[str, Any]) -> float:
    """Return what a forward waited for weights that moved, or was charged for them; ``stats`` is
    ``Stats.to_json``.
    """
    blocks = stats["blocks"].values()
    return blocks_transfer_ms(blocks, mode=stats["mode"], forwards=stats["forwards"])


def blocks_transfer_ms(blocks: Iterable[Mapping[str, Any]], *, mode: str, forwards: int) -> float:
    """Sum over the blocks that moved; what was timed of the others is the hooks themselves."""
    charged = mode == "emulated"
    seconds: float = sum(
        block["transfer_seconds"] for block in blocks if charged or block["bytes_moved"]
    )
    return seconds / forwards * 1e3
