"""Slots of the sizes that experts have: memory that one expert leaves and another takes."""

from collections.abc import Callable

from ..transfer.transport import Transport


class SlotPool:
    """The slots of a transport. ``took`` hears of memory taken, or given back (negative)."""

    def __init__(self, transport: Transport, took: Callable[[int], object]) -> None:
        self.spare: dict[int, list[int]] = {}
        """Slots that nobody uses, by their size."""
        self._transport = transport
        self._took = took
        self.num_bytes = 0
        """What they may take."""
        self._taken = 0

    def resize(self, num_bytes: int) -> None:
        """Keep within so many bytes from here on, as far as slots are not used."""
        self.num_bytes = num_bytes
        self._make_room(0)

    def take(self, num_bytes: int) -> int:
        """Return a slot of that size."""
        spare = self.spare.get(num_bytes)
        if spare:
            return spare.pop()
        self._make_room(num_bytes)
        slot = self._transport.add_slot(num_bytes)
        self._count(num_bytes)
        return slot

    def give_back(self, num_bytes: int, slot: int) -> None:
        """Let a slot serve another expert of its size."""
        self.spare.setdefault(num_bytes, []).append(slot)

    def free(self) -> None:
        """Have no slots; nothing may be on its way into one."""
        self.spare.clear()
        self._transport.make_slots(0, 0)
        self._count(-self._taken)

    def _make_room(self, num_bytes: int) -> None:
        """Free slots of other sizes for one that is still to be made."""
        for size, slots in self.spare.items():
            while slots and self._taken + num_bytes > self.num_bytes:
                self._transport.drop_slot(slots.pop())
                self._count(-size)

    def _count(self, num_bytes: int) -> None:
        self._taken += num_bytes
        self._took(num_bytes)
