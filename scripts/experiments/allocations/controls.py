"""Allocations that a signal's must beat at equal bytes: without a signal, or with a spoilt one.

All fill the same budget from the same options of a block (``allocate.Option``, most precise first):

- ``raise_in_order``: the most precise width that all blocks can have, then one step more for block
  after block of an order; of a random order it is the *uniform* mix, ends first the hand-made rule
  that protects the first and the last layers;
- ``raise_at_random``: from the lowest precision of all, one step of a random block after another;
- ``permute_curves``: the signal's own curves per weight, each given to another block: *shuffled*
  (a random permutation), or *inverse* (the most sensitive block's to the least sensitive one).

A uniform width alone has few sizes. Between two of them lies the *log chord*: log KL on the
straight line over bytes (``log_chord``). Buying bytes at a uniform width moves along it, so what a
signal is worth is the KL's fraction of the chord at the same bytes.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence

from lib.errors import InputError
from lib.precision.allocate import Option
from lib.vocabulary import Precision

Options = Mapping[str, Sequence[Option]]
"""Block -> what it can be held at, most precise first."""


def raise_in_order(
    options: Options, order: Sequence[str], *, cost_budget: float
) -> dict[str, Precision]:
    """Take the best width that all blocks fit in, then raise those that still fit, in order, step
    by step. Raises InputError for a budget below the lowest width.
    """
    fill = _Fill(options, cost_budget)
    while fill.all_fit():
        for name in options:
            fill.raise_one(name)
    while any([fill.raise_one(name) for name in order]):
        pass
    return fill.precisions


def raise_at_random(options: Options, *, cost_budget: float, seed: int) -> dict[str, Precision]:
    """Raise random blocks from their lowest precision, a step at a time, until no step fits.

    Raises InputError for a budget below the lowest width.
    """
    fill = _Fill(options, cost_budget)
    generator = random.Random(seed)
    names = list(options)
    while names:
        name = generator.choice(names)
        if not fill.raise_one(name):
            names.remove(name)
    return fill.precisions


def random_order(names: Iterable[str], *, seed: int) -> list[str]:
    """Return the names in a random order."""
    order = list(names)
    random.Random(seed).shuffle(order)
    return order


def ends_first(names: Sequence[str]) -> list[str]:
    """Return blocks, given from input to output, by their distance to the nearer end."""
    last = len(names) - 1
    places = sorted(range(len(names)), key=lambda place: min(place, last - place))
    return [names[place] for place in places]


def permute_curves(
    options: Options, weights: Mapping[str, int], giver: Mapping[str, str]
) -> dict[str, list[Option]]:
    """Return options in which each block has the KL per weight of the block that ``giver`` names.

    ``weights``: block -> number of weights. All blocks must have the same precisions.
    """
    permuted = {}
    for name, choices in options.items():
        other = options[giver[name]]
        assert [o.precision for o in other] == [o.precision for o in choices]
        ratio = weights[name] / weights[giver[name]]
        permuted[name] = [
            Option(own.precision, own.cost, given.kl * ratio)
            for own, given in zip(choices, other, strict=True)
        ]
    return permuted


def shuffled_givers(names: Sequence[str], *, seed: int) -> dict[str, str]:
    """Return a random permutation of the blocks."""
    return dict(zip(names, random_order(names, seed=seed), strict=True))


def inverse_givers(options: Options, weights: Mapping[str, int]) -> dict[str, str]:
    """Return the permutation that turns the order of sensitivity per weight around."""
    ranked = sorted(options, key=lambda name: options[name][-1].kl / weights[name])
    return dict(zip(ranked, reversed(ranked), strict=True))


def log_chord(points: Iterable[tuple[float, float]], cost: float) -> float:
    """Return the KL at ``cost`` on the log chord of (cost, KL) points of uniform widths.

    Raises InputError outside their range.
    """
    ordered = sorted(points)
    for (low, low_kl), (high, high_kl) in zip(ordered, ordered[1:], strict=False):
        if low <= cost <= high:
            share = (cost - low) / (high - low)
            return math.exp((1 - share) * math.log(low_kl) + share * math.log(high_kl))
    raise InputError(
        f"{cost:.6g} bytes lie outside the uniform widths, {ordered[0][0]:.6g} to "
        f"{ordered[-1][0]:.6g}: give a budget between them"
    )


class _Fill:
    """A choice for each block that is raised step by step within a budget."""

    def __init__(self, options: Options, cost_budget: float) -> None:
        self._options = options
        self._place = {name: len(choices) - 1 for name, choices in options.items()}
        self._left = cost_budget - math.fsum(choices[-1].cost for choices in options.values())
        if self._left < 0:
            raise InputError(
                f"a budget of {cost_budget:.6g} bytes is below the lowest precision's "
                f"{cost_budget - self._left:.6g}"
            )

    @property
    def precisions(self) -> dict[str, Precision]:
        return {name: self._options[name][place].precision for name, place in self._place.items()}

    def all_fit(self) -> bool:
        """Say whether one step more of every block fits."""
        return all(self._place.values()) and sum(map(self._step, self._place)) <= self._left

    def raise_one(self, name: str) -> bool:
        """Raise a block by one step if that fits."""
        if not self._place[name] or self._step(name) > self._left:
            return False
        self._left -= self._step(name)
        self._place[name] -= 1
        return True

    def _step(self, name: str) -> float:
        choices, place = self._options[name], self._place[name]
        return choices[place - 1].cost - choices[place].cost
