"""The cache for experts that are below: which are in fast memory, and how they get there.

``policy.experts`` decides what stays. What a token is routed to and isn't there is read at once;
what the next layers are expected to route to is read behind that, into room that is free or worth
less.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...policy.experts import Admission, Counters, ExpertCache
from ...policy.plan import Plan
from ..payload.layout import Payload
from ..transfer.transport import Ticket
from .cache_shape import CacheShape, shape_cache, warn_below_cycle
from .fast_memory import FastMemory
from .foresight import Foresight
from .held_expert import ExpertWeight, HeldExpert
from .listed import ListedExpert, ListedExperts
from .packed import PackedExperts
from .slot_pool import SlotPool
from .stand_ins import plain_tensors

Expert = HeldExpert | ListedExpert
Weights = Mapping[str, ExpertWeight]
"""One expert's weights by parameter."""
Tokens = Sequence[Sequence[int]]
"""What each token is routed to."""
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
        layers: Sequence[PackedExperts | ListedExperts],
        router_counts: Mapping[str, float],
        *,
        emulated: bool,
    ) -> None:
        self.policy = "ours"
        """What decides which experts stay, of ``POLICIES``; from the next plan on."""
        self._memory = memory
        self._layers = layers
        self._router_counts = router_counts
        self.transport = memory.transport.another()
        self.pool = SlotPool(
            self.transport, (lambda num_bytes: None) if emulated else memory.watcher.took
        )
        self.cache: ExpertCache | None = None
        """What is cached; None where no experts are below."""
        self.ready = 0
        """Uses in decoding that waited for nothing."""
        self.withdrawn = 0
        """Predictions that were not read, since their layer came before."""
        self._counters = Counters()
        self.foresight = Foresight()
        """What is read ahead, and whether that pays."""
        self._shape: CacheShape | None = None
        self._plan: Plan | None = None
        self._has_warned = False
        self.is_busy = False
        """A use has begun and not come to its end."""
        self._slots: dict[Expert, tuple[Ticket, Weights | None]] = {}
        """Without weights until somebody has waited for them; those of lists keep none."""

    # -- placing -----------------------------------------------------------------------------------

    def free(self) -> None:
        """Have no slots until ``adopt``."""
        for expert, (ticket, weights) in self._slots.items():
            if not self.transport.withdraw(ticket):
                ticket.arrived.wait()
            if weights is not None:
                self._memory.transitions.leave(expert.name)
        self._slots.clear()
        self.pool.free()
        self.cache = None
        self.foresight.clear()

    def begin(self, plan: Plan, payloads: Mapping[str, Payload]) -> None:
        """Take no more than a plan allows from here on, which is to be adopted next. What is cached
        stays as far as it can, unless experts go elsewhere or change their precision.
        """
        experts = [each for layer in self._layers for each in layer.experts]
        if self.cache is not None and all(
            each.tier is plan.placements[each.name].tier
            and each.payload.precision is payloads[each.name].precision
            for each in experts
        ):
            self._resize(min(plan.cache_bytes, self.pool.num_bytes))
        else:
            self.free()

    def _resize(self, num_bytes: int) -> None:
        assert self.cache is not None and self._shape is not None
        self._evict(self.cache.set_capacity(num_bytes - self._shape.aside_bytes))
        self.pool.resize(num_bytes)

    def adopt(self, plan: Plan) -> None:
        """Have the slots of a plan; at first what was routed to most in training is read."""
        self._plan = plan
        if self.cache is not None:
            self._resize(plan.cache_bytes)
            return
        self.pool.resize(plan.cache_bytes)
        shape = self._shape = shape_cache(self._layers, self._router_counts, plan.cache_bytes)
        if shape is None:
            return
        self.cache = ExpertCache(
            shape.sizes,
            plan.cache_bytes - shape.aside_bytes,
            per_token=shape.per_token,
            policy=self.policy,
            counts=shape.counts,
            spare=self.policy == "ours",
        )
        self.cache.counters = self._counters
        if self.cache.below_cycle and not self._has_warned:
            self._has_warned = True
            warn_below_cycle(self.cache)
        for layer, number in self.cache.experts():
            self._submit(self._layers[layer].experts[number], urgent=False)

    @property
    def in_flight(self) -> set[str]:
        """The experts that are on their way; from any thread."""
        slots = list(self._slots.items())
        return {expert.name for expert, (_, weights) in slots if weights is None}

    @property
    def in_slots(self) -> set[str]:
        """Those that somebody has waited for, and are still there; from any thread."""
        slots = list(self._slots.items())
        return {expert.name for expert, (_, weights) in slots if weights is not None}

    # -- use ---------------------------------------------------------------------------------------

    def use(
        self, layer: int, tokens: Tokens, *, meanwhile: Callable[[], None]
    ) -> Iterator[tuple[int, Weights]]:
        """Yield each expert that the tokens of a layer are routed to with its weights in fast
        memory, those first that are there. What was yielded may go when the next is asked for.
        ``meanwhile`` is done once what is missing is on its way.

        Raises PlacementError where stored bytes are not sound.
        """
        experts = self._layers[layer].experts
        experts[0].refuse_written()
        self.is_busy = True
        admission = self._admit(layer, tokens)
        self.foresight.begin(self._memory.charges.now())
        for number in admission.misses:
            self._submit(experts[number], urgent=True)
        assert self.cache is not None
        meanwhile()
        self.cache.learn()
        for number in (*admission.hits, *admission.misses):
            yield number, self._weights(layer, experts[number])
            self.transport.done_with(self._slots[experts[number]][0].slot, shared=False)
        passing = admission.passing
        ahead = 2 if self._shape is not None and self._shape.passes_two else 1
        for place, number in enumerate(passing):
            for each in passing[place : place + ahead]:
                self._submit(experts[each], urgent=True)
            yield number, self._weights(layer, experts[number])
            self._release(experts[number])
        self.is_busy = False

    def take(
        self, layer: int, number: int, tokens: Tokens, *, again: bool, goes_on: bool
    ) -> tuple[Tensor, int]:
        """Wait for one expert of a list, whose layer asks for it ``again`` in a call, or after
        others (``goes_on``); returns its bytes, and how many have moved. They stay until
        ``let_go``. Raises PlacementError where stored bytes are not sound.
        """
        expert = self._layers[layer].experts[number]
        self.is_busy = True
        self.foresight.begin(self._memory.charges.now())
        if not (again and expert in self._slots):
            self._admit(layer, tokens, goes_on=goes_on)
        self._submit(expert, urgent=True)
        ticket, known = self._slots[expert]
        buffer = self._wait(layer, expert) if known is None else self.transport.wait(ticket)
        self._slots[expert] = self._slots[expert][0], {}
        moved = ticket.unit.data_bytes if known is None else 0
        return (expert.shard_in_memory(0) if buffer is None else buffer), moved

    def let_go(self, layer: int, number: int) -> None:
        """End the use of an expert that was taken."""
        expert = self._layers[layer].experts[number]
        self.transport.done_with(self._slots[expert][0].slot, shared=False)
        if self.cache is None or (layer, number) not in self.cache:  # it only passed through
            self._release(expert)
        self.is_busy = False

    def expect(self, layer: int, number: int) -> bool:
        """Read an expert that the layer's next call is expected to use, behind what is needed now;
        returns whether it is on its way for that.
        """
        assert self.cache is not None
        if (layer, number) in self.cache:
            return False
        expert = self._layers[layer].experts[number]
        self.is_busy = True
        evicted = self.cache.admit_predicted(layer, number)
        if evicted is not None:
            self._evict(evicted)
            self._submit(expert, urgent=False)
            self.foresight.guesses.add(layer, number, evicted)
        self.is_busy = False
        return evicted is not None

    def reset_counters(self) -> None:
        """Start counting anew."""
        self.ready = self.withdrawn = 0
        guesses = sum(len(self.foresight.guesses.of(layer)) for layer in range(len(self._layers)))
        self._counters = Counters(predicted=guesses)
        if self.cache is not None:
            self.cache.counters = self._counters

    def _admit(self, layer: int, tokens: Tokens, *, goes_on: bool = False) -> Admission:
        """Ask the cache, and let go of what it evicts."""
        cache = self.cache
        assert cache is not None
        distinct = list(dict.fromkeys(number for token in tokens for number in token))
        needed = sum(cache.sizes[layer][number] for number in distinct)
        guessed = self.foresight.guesses.of(layer)
        self.foresight.guesses.settle(layer, distinct, bypasses=cache.bypasses)
        self._withdraw(layer, guessed)
        if len(tokens) <= FEW_TOKENS and needed <= cache.capacity_bytes:
            there = {number for number in distinct if self._is_there(layer, number)}
            self.ready += len(there)
            admission = cache.use(layer, distinct, goes_on=goes_on)
            hits = sorted(admission.hits, key=lambda number: number not in there)
            admission = admission._replace(hits=tuple(hits))
            for number in admission.misses:
                self.foresight.miss(layer, number, self._layers[layer].experts[number].units[0])
        else:
            admission = cache.use_many(layer, tokens, goes_on=goes_on)
        self._evict(admission.evicted)
        return admission

    def _withdraw(self, layer: int, guessed: Sequence[int]) -> None:
        """Take back what was to be read ahead for a layer and has not begun."""
        for number in guessed:
            held = self._slots.get(expert := self._layers[layer].experts[number])
            if held is not None and self.transport.withdraw(held[0]):
                self._forget(layer, expert)
                self.withdrawn += 1

    def mend(self) -> None:
        """Begin anew after a use that was interrupted, perhaps in the midst of a decision."""
        if self.is_busy:
            self.is_busy = False
            self.free()
            if self._plan is not None:
                self.adopt(self._plan)

    def _is_there(self, layer: int, number: int) -> bool:
        held = self._slots.get(self._layers[layer].experts[number])
        return held is not None and self.transport.has_arrived(held[0])

    def _weights(self, layer: int, expert: Any) -> Weights:
        """Wait for an expert; returns its weights."""
        self._submit(expert, urgent=True)  # after an interrupt it may not have been asked for
        ticket, weights = self._slots[expert]
        self._memory.watcher.called(expert.name)
        if weights is not None:
            return weights
        with self._memory.watcher.moving(expert.name) as moved, plain_tensors():
            buffer = self._wait(layer, expert)
            moved(ticket.unit.data_bytes)
        made: Weights = expert.view(expert.shard_in_memory(0) if buffer is None else buffer)
        self._slots[expert] = self._slots[expert][0], made
        return made

    def _wait(self, layer: int, expert: Expert) -> Tensor | None:
        """Wait for an expert that is on its way, and learn from that. What could not be read ahead
        of this use is read once more.
        """
        begun = self._memory.charges.now()
        ticket = self._slots[expert][0]
        if ticket.asked < self.foresight.asked:
            ticket.arrived.wait()
            if ticket.error is not None:
                self._release(expert)
                self._submit(expert, urgent=True)
                ticket = self._slots[expert][0]
        try:
            buffer = self.transport.wait(ticket)
        except BaseException:
            if ticket.error is not None:  # not an interrupt: the read has failed
                self._forget(layer, expert)
            raise
        waited = self._memory.charges.now() - begun
        self.foresight.judge(layer, expert.number, ticket, begun, waited)
        self._memory.transitions.arrive(
            expert.name, ticket.asked, ticket.ended, ticket.unit.num_bytes
        )
        return buffer

    # -- slots -------------------------------------------------------------------------------------

    def _submit(self, expert: Expert, *, urgent: bool) -> None:
        """Ask for an expert in a slot, unless it has one."""
        if expert in self._slots:
            return
        unit = expert.units[0]
        slot = self.pool.take(unit.num_bytes)
        try:
            self._slots[expert] = self.transport.submit(unit, slot, urgent=urgent), None
        except BaseException:
            self.pool.give_back(unit.num_bytes, slot)
            raise

    def _evict(self, evicted: Sequence[tuple[int, int]]) -> None:
        for layer, number in evicted:
            self.foresight.guesses.drop(layer, number)
            self._release(self._layers[layer].experts[number])

    def _release(self, expert: Expert) -> None:
        """Let an expert's slot serve another; of a list's, callers may have kept views."""
        if (held := self._slots.pop(expert, None)) is not None:
            ticket, weights = held
            if weights is not None:
                self._memory.transitions.leave(expert.name)
            elif not self.transport.withdraw(ticket) and ticket.error is None:
                # Nobody has waited for it: it was read for nothing.
                with self._memory.watcher.moving(expert.name) as moved:
                    moved(ticket.unit.data_bytes)
            self.transport.done_with(ticket.slot, shared=not weights)
            self.pool.give_back(ticket.unit.num_bytes, ticket.slot)

    def _forget(self, layer: int, expert: Expert) -> None:
        """Take an admission back of which the bytes didn't come."""
        assert self.cache is not None
        if (layer, expert.number) in self.cache:
            self.cache.forget(layer, expert.number)
        self.foresight.guesses.drop(layer, expert.number)
        self._release(expert)
