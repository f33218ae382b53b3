"""The cache for experts that are below: which are in fast memory, and how they get there.

``policy.experts`` decides what stays. What a token is routed to and isn't there is read at once;
what the next layers are expected to route to is read behind that, into room that is free or worth
less.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence

from ...policy.experts import Admission, Counters, ExpertCache
from ...policy.plan import Plan
from ...units import format_bytes
from ..payload.layout import Payload
from ..transfer.transport import Ticket, Unit
from .fast_memory import FastMemory
from .foresight import Foresight
from .held_expert import ExpertWeight, HeldExpert
from .packed import PackedExperts
from .stand_ins import plain_tensors

Weights = Mapping[str, ExpertWeight]
"""One expert's weights by parameter."""
FEW_TOKENS = 16
"""More are a prompt's, which must not push out what decoding uses."""


class ExpertSlots:
    """Experts in slots of their own sizes, within the bytes that a plan has for them.

    ``router_counts``: how often each block was routed to in training, if that is known.
    ``emulated``: slots take no memory.
    """

    def __init__(
        self,
        memory: FastMemory,
        packed: Sequence[PackedExperts],
        router_counts: Mapping[str, float],
        *,
        emulated: bool,
    ) -> None:
        self.policy = "ours"
        """What decides which experts stay, of ``POLICIES``; from the next plan on."""
        self._memory = memory
        self._packed = packed
        self._router_counts = router_counts
        self._is_emulated = emulated
        self.transport = memory.transport.another()
        self.cache: ExpertCache | None = None
        """What is cached; None where no experts are below."""
        self.ready = 0
        """Uses in decoding that waited for nothing."""
        self.withdrawn = 0
        """Predictions that were not read, since their layer came before."""
        self.foresight = Foresight()
        """What is read ahead, and whether that pays."""
        self._num_bytes = 0
        self._aside = 0
        """Bytes that are no cache's: one or two of the largest experts pass through them."""
        self._passes_two = False
        self._plan: Plan | None = None
        self._has_warned = False
        self._taken = 0
        self._is_busy = False
        """A use has begun and not come to its end."""
        self._spare: dict[int, list[int]] = {}
        self._slots: dict[HeldExpert, tuple[Ticket, Weights | None]] = {}

    # -- placing -----------------------------------------------------------------------------------

    def free(self) -> None:
        """Have no slots until ``adopt``."""
        for ticket, _ in self._slots.values():
            if not self.transport.withdraw(ticket):
                ticket.arrived.wait()
        self._slots.clear()
        self._spare.clear()
        self.transport.make_slots(0, 0)
        self.cache = None
        self.foresight.clear()
        self._take(-self._taken)

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
        self._evict(self.cache.set_capacity(num_bytes - self._aside))
        self._make_room(0)

    def adopt(self, plan: Plan) -> None:
        """Have the slots of a plan; at first what was routed to most in training is read."""
        self._plan = plan
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
            layer: [_unit(each).num_bytes for each in experts] for layer, experts in layers.items()
        }
        per_token = {
            layer: min(self._packed[layer].routed, len(experts))
            for layer, experts in layers.items()
        }
        largest = max(max(each) for each in sizes.values())
        needed = max(
            sum(sorted(each, reverse=True)[: per_token[layer]]) for layer, each in sizes.items()
        )
        self._passes_two = needed + 2 * largest <= self._num_bytes
        self._aside = (2 if self._passes_two else 1) * largest
        counts = {
            (layer, each.number): self._router_counts[each.name]
            for layer, experts in layers.items()
            for each in experts
            if each.name in self._router_counts
        }
        self.cache = ExpertCache(
            sizes,
            self._num_bytes - self._aside,
            per_token=per_token,
            policy=self.policy,
            counts=counts,
            spare=self.policy == "ours",
        )
        if self.cache.below_cycle and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{format_bytes(self.cache.capacity_bytes)} for experts is less than a token uses, "
                f"{format_bytes(self.cache.cycle_bytes)}: most are read for every token; give that "
                "much more HBM, or fewer bits",
                RuntimeWarning,
                stacklevel=2,
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
        passing = admission.passing
        for place, number in enumerate(passing):
            for each in passing[place : place + 1 + self._passes_two]:
                self._submit(experts[each], urgent=True)
            yield number, self._weights(layer, experts[number])
            self._release(experts[number])
        self._is_busy = False

    def expect(self, layer: int, number: int) -> bool:
        """Read an expert that the layer's next call is expected to use, behind what is needed now;
        returns whether it is on its way for that.
        """
        assert self.cache is not None
        expert = self._packed[layer].experts[number]
        self._is_busy = True
        evicted = self.cache.admit_predicted(layer, number)
        if evicted is not None:
            self._evict(evicted)
            self._submit(expert, urgent=False)
            self.foresight.guesses.add(layer, number, evicted)
        self._is_busy = False
        return evicted is not None

    def reset_counters(self) -> None:
        """Start counting anew."""
        self.ready = self.withdrawn = 0
        if self.cache is not None:
            open_guesses = sum(len(self.foresight.guesses.of(layer)) for layer in self.cache.sizes)
            self.cache.counters = Counters(predicted=open_guesses)

    def wants(self, layer: int) -> bool:
        """Say whether the routing of a layer's next call should be predicted."""
        return (
            self.cache is not None
            and layer in self.cache.sizes
            and self.foresight.speculation.wants()
        )

    def _admit(self, layer: int, tokens: Sequence[Sequence[int]]) -> Admission:
        """Ask the cache, and let go of what it evicts."""
        cache = self.cache
        assert cache is not None
        distinct = list(dict.fromkeys(number for token in tokens for number in token))
        needed = sum(cache.sizes[layer][number] for number in distinct)
        self._withdraw(layer)
        self.foresight.guesses.settle(layer, distinct)
        if len(tokens) <= FEW_TOKENS and needed <= cache.capacity_bytes:
            self.ready += sum(self._is_there(layer, number) for number in distinct)
            admission = cache.use(layer, distinct)
            for number in admission.misses:
                self.foresight.miss(layer, number, _unit(self._packed[layer].experts[number]))
        else:
            admission = cache.use_many(layer, tokens)
        self._evict(admission.evicted)
        return admission

    def _withdraw(self, layer: int) -> None:
        """Take back what was to be read ahead for a layer and has not begun."""
        assert self.cache is not None
        for number in self.foresight.guesses.of(layer):
            held = self._slots.get(expert := self._packed[layer].experts[number])
            if held is not None and self.transport.withdraw(held[0]):
                self._forget(layer, expert)
                self.withdrawn += 1

    def mend(self) -> None:
        """Begin anew after a use that was interrupted, perhaps in the midst of a decision."""
        if self._is_busy:
            self._is_busy = False
            self.free()
            if self._plan is not None:
                self.adopt(self._plan)

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
            except BaseException:
                if ticket.error is not None:  # not an interrupt: the read has failed
                    self._forget(layer, expert)
                raise
            moved(ticket.unit.data_bytes)
        self.foresight.judge(layer, expert.number, ticket, self._memory.charges.now() - begun)
        if buffer is None:
            buffer = expert.shard_in_memory(0)
        weights = expert.view(buffer)
        self._slots[expert] = ticket, weights
        return weights

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
            self._take(unit.num_bytes)
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
                self._take(-size)

    def _take(self, num_bytes: int) -> None:
        self._taken += num_bytes
        if not self._is_emulated:
            self._memory.watcher.took(num_bytes)

    def _evict(self, evicted: Sequence[tuple[int, int]]) -> None:
        for layer, number in evicted:
            self.foresight.guesses.drop(layer, number)
            self._release(self._packed[layer].experts[number])

    def _release(self, expert: HeldExpert) -> None:
        """Let an expert's slot serve another."""
        held = self._slots.pop(expert, None)
        if held is not None:
            ticket, weights = held
            if weights is None and not self.transport.withdraw(ticket) and ticket.error is None:
                # Nobody has waited for it: it was read for nothing.
                with self._memory.watcher.moving(expert.name) as moved:
                    moved(ticket.unit.data_bytes)
            self.transport.done_with(ticket.slot, shared=False)
            self._spare.setdefault(ticket.unit.num_bytes, []).append(ticket.slot)

    def _forget(self, layer: int, expert: HeldExpert) -> None:
        """Take an admission back of which the bytes didn't come."""
        assert self.cache is not None
        if (layer, expert.number) in self.cache:
            self.cache.forget(layer, expert.number)
        self.foresight.guesses.drop(layer, expert.number)
        self._release(expert)


def _unit(expert: HeldExpert) -> Unit:
    (unit,) = expert.units
    return unit
