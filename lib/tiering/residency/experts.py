"""The cache for experts that are below: which are in fast memory, and how they get there.

``policy.experts`` decides what stays. What a token is routed to and isn't there is read at once;
what the next layers are expected to route to is read behind that, into room that is free or worth
less.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from ...codecs.kernels import EncodedWeight
from ...errors import PlacementError
from ...policy.experts import Admission, Counters, ExpertCache
from ...policy.experts.speculation import Speculation
from ...policy.plan import Plan
from ..payload.contents import part_view
from ..payload.layout import Payload
from ..transfer.transport import Ticket, Unit
from .fast_memory import FastMemory
from .guesses import Guesses
from .held_expert import ExpertWeight, HeldExpert
from .packed import PackedExperts
from .stand_ins import plain_tensors

Weights = Mapping[str, ExpertWeight]
"""One expert's weights by parameter."""
_LEARNT = 0.1
"""Weight of the latest read in what reads take."""
_LATE = 0.25
"""Share of a read's time that may be waited for what was read ahead, and of the reads that may be
late."""
FEW_TOKENS = 16
"""More are a prompt's, which must not push out what decoding uses."""


class ExpertSlots:
    """Experts in slots of their own sizes, within the bytes that a plan has for them.

    ``router_counts``: how often each block was routed to in training, if that is known.
    """

    def __init__(
        self,
        memory: FastMemory,
        packed: Sequence[PackedExperts],
        router_counts: Mapping[str, float],
    ) -> None:
        self.policy = "ours"
        """What decides which experts stay, of ``POLICIES``; from the next plan on."""
        self._memory = memory
        self._packed = packed
        self._router_counts = router_counts
        self.transport = memory.transport.another()
        self.cache: ExpertCache | None = None
        """What is cached; None where no experts are below."""
        self.ready = 0
        """Uses in decoding that waited for nothing."""
        self.speculation = Speculation()
        """Whether reading ahead pays."""
        self._guesses = Guesses()
        self._read_seconds: dict[int, float] = {}
        """Lately, by bytes."""
        self._lateness = 0.0
        self._last_ended = 0.0
        self._num_bytes = 0
        self._largest = 0
        """Bytes of the largest expert: what is kept free to pass others through."""
        self._taken = 0
        self._is_busy = False
        """A use has begun and not come to its end."""
        self._spare: dict[int, list[int]] = {}
        self._slots: dict[HeldExpert, tuple[Ticket, Weights | None]] = {}

    # -- placing -----------------------------------------------------------------------------------

    def free(self) -> None:
        """Have no slots until ``adopt``."""
        for ticket, _ in self._slots.values():
            ticket.arrived.wait()
        for kept in (self._slots, self._spare, self._guesses):
            kept.clear()
        self.transport.make_slots(0, 0)
        self.cache, self._taken, self.speculation = None, 0, Speculation()

    def begin(self, plan: Plan, payloads: Mapping[str, Payload]) -> None:
        """Take no more than a plan allows from here on, which is to be adopted next. What is cached
        stays as far as it can, unless experts go elsewhere or change their precision.
        """
        experts = [each for packed in self._packed for each in packed.experts]
        if self.cache is not None and all(
            each.tier is plan.placements[each.name].tier
            and each.payload.precision is payloads[each.name].precision
            for each in experts
        ):
            self._resize(min(plan.cache_bytes, self._num_bytes))
        else:
            self.free()

    def _resize(self, num_bytes: int) -> None:
        assert self.cache is not None
        self._num_bytes = num_bytes
        self._evict(self.cache.set_capacity(num_bytes - self._largest))
        self._make_room(0)

    def adopt(self, plan: Plan) -> None:
        """Have the slots of a plan; at first what was routed to most in training is read."""
        if self.cache is not None:
            self._resize(plan.cache_bytes)
            return
        self._num_bytes = plan.cache_bytes
        layers = {
            layer: packed.experts
            for layer, packed in enumerate(self._packed)
            if any(each.units for each in packed.experts)
        }
        if not layers:
            return
        sizes = {
            layer: [max(_unit(each).num_bytes, 1) if each.units else 1 for each in experts]
            for layer, experts in layers.items()
        }
        self._largest = max(max(each) for each in sizes.values())
        per_token = {
            layer: min(self._packed[layer].routed, len(experts))
            for layer, experts in layers.items()
        }
        counts = {
            (layer, each.number): self._router_counts[each.name]
            for layer, experts in layers.items()
            for each in experts
            if each.name in self._router_counts
        }
        self.cache = ExpertCache(
            sizes,
            self._num_bytes - self._largest,
            per_token=per_token,
            policy=self.policy,
            counts=counts,
            spare=self.policy == "ours",
        )
        for layer, number in self.cache.experts():
            self._submit(self._packed[layer].experts[number], urgent=False)

    # -- use ---------------------------------------------------------------------------------------

    def use(self, layer: int, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[int, Weights]]:
        """Yield each expert that the tokens of a layer are routed to with its weights in fast
        memory, those first that are there. What was yielded may go when the next is asked for.

        Raises PlacementError where stored bytes are not sound.
        """
        experts = self._packed[layer].experts
        experts[0].refuse_written()
        self._is_busy = True
        admission = self._admit(layer, tokens)
        for number in admission.misses:
            self._submit(experts[number], urgent=True)
        for number in (*admission.hits, *admission.misses):
            yield number, self._weights(layer, experts[number])
            self.transport.done_with(self._slots[experts[number]][0].slot, shared=False)
        for number in admission.passing:
            try:
                self._submit(experts[number], urgent=True)
                yield number, self._weights(layer, experts[number])
            finally:
                self._release(experts[number])
        self._is_busy = False

    def expect(self, layer: int, number: int) -> bool:
        """Read an expert that the layer's next call is expected to use, behind what is needed now;
        returns whether it is on its way for that.
        """
        assert self.cache is not None
        expert = self._packed[layer].experts[number]
        evicted = self.cache.admit_predicted(layer, number)
        if evicted is None:
            return False
        self._evict(evicted)
        self._submit(expert, urgent=False)
        self._guesses.add(layer, number, evicted)
        return True

    def reset_counters(self) -> None:
        """Start counting anew."""
        self.ready = 0
        if self.cache is not None:
            self.cache.counters = Counters()

    def wants(self, layer: int) -> bool:
        """Say whether the routing of a layer's next call should be predicted."""
        return self.cache is not None and layer in self.cache.sizes and self.speculation.wants()

    @property
    def reads_late(self) -> bool:
        """What is read ahead for the layer that begins mostly comes too late."""
        return self._lateness > _LATE

    def spend(self, seconds: float) -> None:
        """Book what a prediction has taken."""
        self.speculation.lose(seconds)

    def _admit(self, layer: int, tokens: Sequence[Sequence[int]]) -> Admission:
        """Ask the cache, and let go of what it evicts."""
        cache = self.cache
        assert cache is not None
        distinct = list(dict.fromkeys(number for token in tokens for number in token))
        needed = sum(cache.sizes[layer][number] for number in distinct)
        self._withdraw(layer)
        self._guesses.settle(layer, distinct)
        if len(tokens) <= FEW_TOKENS and needed <= cache.capacity_bytes:
            self.ready += sum(self._is_there(layer, number) for number in distinct)
            admission = cache.use(layer, distinct)
            for number in admission.misses:
                if self._guesses.take_gone(layer, number):
                    unit = _unit(self._packed[layer].experts[number])
                    self.speculation.lose(self._read_time(unit))
        else:
            admission = cache.use_many(layer, tokens)
        self._evict(admission.evicted)
        return admission

    def _withdraw(self, layer: int) -> None:
        """Take back what was to be read ahead for a layer and has not begun."""
        assert self.cache is not None
        for number in self._guesses.of(layer):
            held = self._slots.get(expert := self._packed[layer].experts[number])
            if held is not None and self.transport.withdraw(held[0]):
                self._forget(layer, expert)

    def mend(self) -> None:
        """Let go of what an interrupted use has left in slots, though the cache let go of it."""
        if self._is_busy and self.cache is not None:
            for layer, packed in enumerate(self._packed):
                for each in packed.experts:
                    if each in self._slots and (layer, each.number) not in self.cache:
                        self._release(each)
        self._is_busy = False

    def _is_there(self, layer: int, number: int) -> bool:
        held = self._slots.get(self._packed[layer].experts[number])
        return held is not None and self.transport.has_arrived(held[0])

    def _weights(self, layer: int, expert: HeldExpert) -> Weights:
        """Wait for an expert; returns its weights."""
        self._submit(expert, urgent=True)  # after an interrupt it may not have been asked for
        ticket, weights = self._slots[expert]
        self._memory.watcher.called(expert.name)
        if weights is not None:
            return weights
        with self._memory.watcher.moving(expert.name) as moved, plain_tensors():
            begun = self._memory.charges.now()
            try:
                buffer = self.transport.wait(ticket)
            except PlacementError:
                self._forget(layer, expert)
                raise
            moved(ticket.unit.data_bytes)
        self._judge(layer, expert, ticket, self._memory.charges.now() - begun)
        if buffer is None:
            buffer = expert.shard_in_memory(0)
        weights = self._view(expert, buffer)
        self._slots[expert] = ticket, weights
        return weights

    def _judge(self, layer: int, expert: HeldExpert, ticket: Ticket, waited: float) -> None:
        """Learn from a read that has been waited for what reads take, and reading ahead gains."""
        usual = self._read_time(ticket.unit)
        if self._guesses.take_right(layer, expert.number):
            self.speculation.gain(usual - waited)
            late = waited > _LATE * usual
            self._lateness += _LEARNT * (late - self._lateness)
        elif self._guesses:
            self.speculation.lose(max(waited - usual, 0.0))
        if ticket.ended:
            took = ticket.ended - max(ticket.asked, self._last_ended)
            self._last_ended = ticket.ended
            size = ticket.unit.num_bytes
            self._read_seconds[size] = usual + _LEARNT * (took - usual) if usual else took

    def _read_time(self, unit: Unit) -> float:
        return self._read_seconds.get(unit.num_bytes, 0.0)

    def _view(self, expert: HeldExpert, buffer: Tensor) -> Weights:
        found: dict[str, ExpertWeight] = {}
        for part in expert.payload.parts:
            if part.record is None:
                found[part.parameter] = part_view(buffer, part)
                continue
            assert self._memory.scratch is not None
            record = buffer[part.offset : part.offset + part.num_bytes]
            found[part.parameter] = EncodedWeight(
                record, part.record, dtype=part.dtype, scratch=self._memory.scratch
            )
        return found

    # -- slots -------------------------------------------------------------------------------------

    def _submit(self, expert: HeldExpert, *, urgent: bool) -> None:
        """Ask for an expert in a slot, unless it has one."""
        if expert in self._slots:
            return
        unit = _unit(expert)
        spare = self._spare.get(unit.num_bytes)
        if spare:
            slot = spare.pop()
        else:
            self._make_room(unit.num_bytes)
            slot = self.transport.add_slot(unit.num_bytes)
            self._taken += unit.num_bytes
        try:
            self._slots[expert] = self.transport.submit(unit, slot, urgent=urgent), None
        except BaseException:
            self._spare.setdefault(unit.num_bytes, []).append(slot)
            raise

    def _make_room(self, num_bytes: int) -> None:
        """Free slots of other sizes for one that is still to be made."""
        for size, slots in self._spare.items():
            while slots and self._taken + num_bytes > self._num_bytes:
                self.transport.drop_slot(slots.pop())
                self._taken -= size

    def _evict(self, evicted: Sequence[tuple[int, int]]) -> None:
        for layer, number in evicted:
            self._guesses.drop(layer, number)
            self._release(self._packed[layer].experts[number])

    def _release(self, expert: HeldExpert) -> None:
        """Let an expert's slot serve another."""
        held = self._slots.pop(expert, None)
        if held is not None:
            ticket = held[0]
            self.transport.done_with(ticket.slot, shared=False)
            self._spare.setdefault(ticket.unit.num_bytes, []).append(ticket.slot)

    def _forget(self, layer: int, expert: HeldExpert) -> None:
        """Take an admission back of which the bytes didn't come."""
        assert self.cache is not None
        if (layer, expert.number) in self.cache:
            self.cache.forget(layer, expert.number)
        self._guesses.drop(layer, expert.number)
        self._release(expert)


def _unit(expert: HeldExpert) -> Unit:
    (unit,) = expert.units
    return unit
