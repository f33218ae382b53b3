"""Demands: weights that are needed in fast memory at the same time, as a forward has shown.

A plan foresees that a module holds its own weights while it runs. Code may need more at once: a
module that takes another one's weight, an expression of several weights, a weight of which only
rows were to be taken. Such a demand is met like the foreseen ones: all but the largest group stay
in fast memory, and one is streamed beside them. What one layer has shown is expected of the others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..payload.layout import Payload


@dataclass(frozen=True, slots=True)
class Demand:
    """Groups that are needed at the same time, and the parameters among them that are needed whole.

    A compressed parameter is expanded then, and one that moves in shards is put together.
    """

    groups: frozenset[str]
    whole: frozenset[str]

    def residents(self, payloads: Mapping[str, Payload]) -> set[str]:
        """Name the groups that have to stay in fast memory."""
        largest = max(self.groups, key=lambda name: payloads[name].num_bytes)
        shards = {name for name in self.groups if self._puts_together(name, payloads)}
        return {*self.groups - {largest}, *shards}

    def expanded_bytes(self, payloads: Mapping[str, Payload]) -> int:
        """Return what the expanded weights take together."""
        return sum(
            part.whole_bytes
            for name in self.groups
            for part in payloads[name].parts
            if part.parameter in self.whole and part.record is not None
        )

    def widened(self, payloads: Mapping[str, Payload]) -> "Demand":
        """Return what the same code may need next: of weights needed together, the layer's others;
        of weights needed whole, those others whole. Outside layers the others are all.
        """
        if len(self.groups) < 2 and not self.whole:
            return self
        layers = {payloads[name].group.layer for name in self.groups}
        beside = {
            name for name, each in payloads.items() if None in layers or each.group.layer in layers
        }
        groups = self.groups | beside
        parts = {part.parameter for name in groups for part in payloads[name].parts}
        return Demand(groups, frozenset(parts) if self.whole else self.whole)

    def like(self, payloads: Mapping[str, Payload]) -> Iterator["Demand"]:
        """Yield the demand, and what corresponds to it in the other layers."""
        yield self
        layers = {payloads[name].group.layer for name in self.groups} - {None}
        if len(layers) != 1:
            return
        own = layers.pop()
        others = {payload.group.layer for payload in payloads.values()} - {None, own}
        for other in others:
            groups = [_in_layer(name, own, other) for name in self.groups]
            if all(name in payloads for name in groups):
                whole = frozenset(_in_layer(name, own, other) for name in self.whole)
                yield Demand(frozenset(groups), whole)

    def _puts_together(self, name: str, payloads: Mapping[str, Payload]) -> bool:
        """Say whether raw shards would be put together: that takes as much as staying does."""
        payload = payloads[name]
        part = payload.parts[0]
        return len(payload.shards) > 1 and part.record is None and part.parameter in self.whole


def _in_layer(name: str, own: int | None, other: int | None) -> str:
    """Return the name that a block or a parameter has in another layer."""
    parts = name.split(".")
    if str(own) in parts:
        parts[parts.index(str(own))] = str(other)
    return ".".join(parts)
