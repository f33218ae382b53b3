"""Which experts stay in fast memory: the decisions, for the simulator and the engine alike.

``ExpertCache`` is told what each layer routed to and answers what has to be read and what has to
go. It owns no memory and knows no time but its own count of calls, so the same calls get the same
answers in any process. All experts share one budget in bytes; no layer has a share of its own.

Values are uses per read, whatever the size: bytes read are saved in proportion to it (size times
probability, per byte of size).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import InputError
from ...units import format_bytes
from .choice import ChosenFading
from .residents import Admission, Expert, Residents
from .values import Frequency, Popularity, Values, distinct

_SOON = math.inf
"""Key of what the next calls are expected to use."""
POLICIES = ("ours", "lru", "lfu", "popularity")


@dataclass(slots=True)
class Counters:
    """What decode steps met so far; ``prompt_reads`` and ``prompt_bytes`` are those of prompts.

    Each use is a hit or a miss. ``predicted`` were read ahead; of them ``wasted`` were not used
    when their layer came, and ``useful`` were.
    """

    steps: int = 0
    hits: int = 0
    misses: int = 0
    missed_bytes: int = 0
    evictions: int = 0
    prompt_reads: int = 0
    prompt_bytes: int = 0
    predicted: int = 0
    useful: int = 0
    wasted: int = 0


class ExpertCache:
    """The experts held within ``capacity_bytes``.

    ``sizes`` has by layer the bytes of each expert, ``per_token`` by layer how many experts a token
    uses. ``policy`` is one of POLICIES; ``counts`` are uses of each expert to start from: router
    counts of the training for ``ours``, and what ``popularity`` goes by. With them the cache starts
    full. ``spare``: the engine has slots beside the cache's for what one layer needs at once, as
    prompts have; below the cycle, what is worth least goes through these. Raises InputError for a
    capacity that can't hold what one layer needs at once.
    """

    def __init__(
        self,
        sizes: Mapping[int, Sequence[int]],
        capacity_bytes: int,
        *,
        per_token: Mapping[int, int],
        policy: str = "ours",
        counts: Mapping[Expert, float] | None = None,
        spare: bool = False,
    ) -> None:
        _check_sizes(sizes, per_token)
        self.sizes = sizes
        widest = {
            layer: sum(sorted(sizes[layer], reverse=True)[: per_token[layer]]) for layer in sizes
        }
        self.smallest_bytes = max(widest.values())
        """What one layer needs at once, at most."""
        self.cycle_bytes = sum(widest.values())
        """What a token needs, at most."""
        self._check_capacity(capacity_bytes)
        self.counters = Counters()
        self._spare = spare
        self.values = _make_values(policy, sizes, per_token, counts)
        self._residents = Residents(sizes, capacity_bytes)
        self._may_learn = False
        self._resize(capacity_bytes)
        self._calls: dict[int, int] = dict.fromkeys(sizes, 0)
        self._chosen = self.values.chosen
        self._current: frozenset[Expert] = frozenset()
        self._predicted: dict[int, dict[int, None]] = {layer: {} for layer in sizes}
        if counts:
            for expert in sorted(counts, key=lambda expert: (-self.values.key(expert), expert)):
                self._residents.offer_one(expert, self.values.key(expert))

    @property
    def capacity_bytes(self) -> int:
        """The budget."""
        return self._residents.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the experts held."""
        return self._residents.used_bytes

    @property
    def below_cycle(self) -> bool:
        """Whether a token may need more than there is room for: LRU then hits next to nothing."""
        return self.capacity_bytes < self.cycle_bytes

    def __contains__(self, expert: Expert) -> bool:
        return expert in self._residents

    def experts(self) -> tuple[Expert, ...]:
        """Return what is held, in the order it came; before the first call what the counts say."""
        return self._residents.experts()

    def use(self, layer: int, experts: Sequence[int], *, goes_on: bool = False) -> Admission:
        """Admit what one decode step routes to in a layer: afterwards all of it is held.

        But for what is ``passing``: only with spare slots, and below the cycle. ``goes_on``: these
        are further experts of the layer's last step, of one that names them one after another.

        Raises InputError where these experts are more than fit, or named twice.
        """
        self._check_experts(layer, experts)
        self._check_fit(layer, experts)
        self.learn()
        call = self._calls[layer] if goes_on else self._begin(layer)
        self.values.touch(layer, experts, call)
        self._settle(layer, experts)
        enter = self._residents.offer if self.bypasses else self._residents.admit
        admission = enter(layer, experts, self.values.key)
        self._current = frozenset((layer, index) for index in experts)
        counters = self.counters
        counters.steps += not goes_on
        counters.hits += len(admission.hits)
        read = (*admission.misses, *admission.passing)
        counters.misses += len(read)
        counters.missed_bytes += self._bytes(layer, read)
        self._note_evicted(admission.evicted)
        self._may_learn = bool(read)
        return admission

    def learn(self) -> None:
        """Do what was put off until something is read: call it once reads are on their way. The
        next call does it otherwise, with the same decisions.
        """
        if self._may_learn:
            self._may_learn = False
            self.values.learn()

    def use_many(
        self, layer: int, tokens: Sequence[Sequence[int]], *, goes_on: bool = False
    ) -> Admission:
        """Admit what a prompt's tokens route to in a layer; each expert is read once at most.

        What is missing stays where there is room or something is worth less; the rest is
        ``passing``, through slots of the prompt's own. ``goes_on`` and InputError as of ``use``.
        """
        if not tokens:
            return Admission(hits=(), misses=(), evicted=())
        for experts in tokens:
            self._check_experts(layer, experts)
        experts = distinct(tokens)
        self.learn()
        call = self._calls[layer] if goes_on else self._begin(layer)
        self.values.touch_prompt(layer, tokens, call)
        self._settle(layer, experts, decodes=False)
        admission = self._residents.offer(layer, experts, self.values.key)
        self._current = frozenset((layer, index) for index in experts)
        read = (*admission.misses, *admission.passing)
        self.counters.prompt_reads += len(read)
        self.counters.prompt_bytes += self._bytes(layer, read)
        self._note_evicted(admission.evicted)
        return admission

    def admit_predicted(self, layer: int, expert: int) -> tuple[Expert, ...] | None:
        """Admit an expert that a layer's next call is expected to use; returns what is evicted.

        It will be used before anything else that is held, so what is worth least goes for it, as it
        would when the layer's call comes; never what the current call uses. None: it is held
        already, or nothing else may go.
        """
        self._check_experts(layer, (expert,))
        if (layer, expert) in self._residents:
            return None
        evicted = self._residents.offer_one((layer, expert), _SOON, keep=self._current)
        if evicted is not None:
            self._predicted[layer][expert] = None
            self.counters.predicted += 1
            self._note_evicted(evicted)
        return evicted

    def forget(self, layer: int, expert: int) -> None:
        """Take an admission back: nothing was read."""
        self._predicted[layer].pop(expert, None)
        self._residents.drop((layer, expert))

    def set_capacity(self, capacity_bytes: int) -> tuple[Expert, ...]:
        """Change the budget at once; returns what has to leave for it.

        A shrink may take what the last call used: call it between calls. Raises InputError, and
        changes nothing, below what one layer needs.
        """
        self._check_capacity(capacity_bytes)
        self._resize(capacity_bytes)
        evicted = self._residents.make_room(0)
        self._note_evicted(evicted)
        return evicted

    @property
    def bypasses(self) -> bool:
        """What is worth least goes through the slots beside the cache's."""
        return self._spare and self.below_cycle

    def _resize(self, capacity_bytes: int) -> None:
        self._residents.capacity_bytes = capacity_bytes
        self.values.resize(capacity_bytes, bypasses=self.bypasses)

    def _begin(self, layer: int) -> int:
        """Start a layer's next call: its residents are older by one; returns its number."""
        call = self._calls[layer] = self._calls[layer] + 1
        if self._chosen != self.values.chosen:
            self._chosen = self.values.chosen
            for expert in self._residents.experts():
                self._residents.change_key(expert, self._key(expert))
            for other, calls in self._calls.items():
                self._residents.shift(other, calls * self.values.rates[self._chosen])
        self._residents.shift(layer, call * self.values.rates[self._chosen])
        return call

    def _key(self, expert: Expert) -> float:
        layer, index = expert
        if index in self._predicted[layer]:
            return _SOON
        return self.values.key(expert)

    def _settle(self, layer: int, experts: Sequence[int], *, decodes: bool = True) -> None:
        """Judge what was predicted for this call; what was not used has its own worth again. What a
        prompt uses of it isn't counted.
        """
        predicted = self._predicted[layer]
        wrong = [index for index in predicted if index not in experts]
        if decodes:
            self.counters.useful += len(predicted) - len(wrong)
        self.counters.wasted += len(wrong)
        predicted.clear()
        for index in wrong:
            self._residents.change_key((layer, index), self.values.key((layer, index)))

    def _note_evicted(self, evicted: Sequence[Expert]) -> None:
        self.counters.evictions += len(evicted)
        for layer, index in evicted:
            if index in self._predicted[layer]:
                del self._predicted[layer][index]
                self.counters.wasted += 1

    def _bytes(self, layer: int, experts: Sequence[int]) -> int:
        return sum(self.sizes[layer][index] for index in experts)

    def _check_capacity(self, capacity_bytes: int) -> None:
        if capacity_bytes < self.smallest_bytes:
            raise InputError(
                f"{format_bytes(capacity_bytes)} for experts is less than one layer needs at once: "
                f"give {format_bytes(self.smallest_bytes)} ({self.smallest_bytes} bytes) or more"
            )

    def _check_experts(self, layer: int, experts: Sequence[int]) -> None:
        if layer not in self.sizes:
            raise InputError(f"layer {layer} has no experts here: those of {list(self.sizes)} have")
        count = len(self.sizes[layer])
        for index in experts:
            if not 0 <= index < count:
                raise InputError(f"layer {layer} has no expert {index}: give 0 to {count - 1}")
        if len(set(experts)) != len(experts):
            raise InputError(f"layer {layer} is given an expert twice: {list(experts)}")

    def _check_fit(self, layer: int, experts: Sequence[int]) -> None:
        needed = self._bytes(layer, experts)
        if needed > self.capacity_bytes:
            raise InputError(
                f"layer {layer} uses {len(experts)} experts of {format_bytes(needed)} at once, "
                f"above the {format_bytes(self.capacity_bytes)} there are: several tokens are for "
                "use_many"
            )


def _make_values(
    policy: str,
    sizes: Mapping[int, Sequence[int]],
    per_token: Mapping[int, int],
    counts: Mapping[Expert, float] | None,
) -> Values:
    if policy == "ours":
        return ChosenFading(sizes, per_token=per_token, counts=counts)
    if policy == "lru":
        return Values()
    if policy == "lfu":
        return Frequency()
    if policy == "popularity":
        return Popularity(counts or {})
    raise InputError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")


def _check_sizes(sizes: Mapping[int, Sequence[int]], per_token: Mapping[int, int]) -> None:
    for layer, experts in sizes.items():
        used = per_token.get(layer, 0)
        if not 1 <= used <= len(experts):
            raise InputError(
                f"a token uses {used} of the {len(experts)} experts of layer {layer}: "
                f"give 1 to {len(experts)} in per_token"
            )
        if min(experts) < 1:
            raise InputError(f"layer {layer} has an expert of {min(experts)} bytes: give 1 or more")
    if not sizes:
        raise InputError("no layer has experts: give their sizes")
