"""How many bits each block gets in another tool's format.

``precision.allocate`` chooses: least KL within a number of bits, nothing below a block's floor.

Without measured curves KL is taken as importance · weights · 4^-bits: Fisher information per weight
times the mean squared rounding error, which falls fourfold with a bit. Of two blocks the more
important one then never gets fewer bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..hints import BlockHint
from ..precision.allocate import Option, allocate_precisions
from ..vocabulary import Precision
from .outline import list_some

_ORDER = list(Precision)
_PROHIBITIVE = 1e12
"""KL that nothing is worth: of what may not be made coarser."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A block's matrices, and how many bits they take at each precision the format has."""

    name: str
    hint: BlockHint
    num_params: int
    sizes: Mapping[Precision, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """The precision of each block, what it was chosen by, and the mean bits per weight."""

    precisions: Mapping[str, Precision]
    basis: str
    bits: float
    predicted_kl: float | None
    lost: tuple[str, ...]


def choose_widths(
    candidates: Sequence[Candidate], steps: Sequence[Precision], bits: float | None
) -> Widths:
    """Give every block one of ``steps``, or its floor where that is more precise.

    ``bits``: mean bits per weight; None takes the floors as they are if every block has one, else
    the mean of the steps. Raises InputError for hints that rank nothing, or too few bits.
    """
    floors = [candidate.hint.floor for candidate in candidates]
    if bits is None and all(floors):
        return _report(candidates, {c.name: _allowed(c, steps)[-1] for c in candidates}, "floors")
    allowed = {c.name: _allowed(c, steps) for c in candidates}
    curves, basis, lost = _curves(candidates, allowed)
    num_params = sum(candidate.num_params for candidate in candidates)
    least = sum(min(c.sizes[p] for p in allowed[c.name]) for c in candidates)
    if bits is None:
        even = sum(c.sizes[step] for c in candidates for step in steps) / len(steps)
        budget = max(even, least)
    else:
        budget = bits * num_params
    if least > budget * (1 + 1e-9):
        raise InputError(
            f"--bits {bits} is too few: with the floors, and the types that this format has for "
            f"the model's shapes, the least is {least / num_params:.4f}"
        )
    options = {
        c.name: [Option(p, c.sizes[p], curves[c.name][p]) for p in allowed[c.name]]
        for c in candidates
    }
    chosen = allocate_precisions(options, cost_budget=max(budget, least)).precisions
    return _report(candidates, chosen, basis, lost)


def _allowed(candidate: Candidate, steps: Sequence[Precision]) -> list[Precision]:
    """Return the steps that are not below the floor, most precise first; the nearest precision that
    the format has where none is.
    """
    floor = candidate.hint.floor
    if floor is None:
        return list(steps)
    enough = [step for step in steps if _ORDER.index(step) <= _ORDER.index(floor)]
    if enough:
        return enough
    known = [p for p in candidate.sizes if _ORDER.index(p) <= _ORDER.index(floor)]
    return [max(known, key=_ORDER.index)]


def _curves(
    candidates: Sequence[Candidate], allowed: Mapping[str, Sequence[Precision]]
) -> tuple[dict[str, dict[Precision, float]], str, tuple[str, ...]]:
    """Return KL by block and precision, what it is made from, and what had to be left out."""
    lacking = [c.name for c in candidates if not set(allowed[c.name]) <= set(c.hint.kl)]
    if not lacking:
        return {c.name: dict(c.hint.kl) for c in candidates}, "kl", ()
    lost: list[str] = []
    if len(lacking) < len(candidates):
        lost.append(
            f"KL curves: {list_some(lacking)} have none for {', '.join(allowed[lacking[0]])}, so "
            "importance decides for all"
        )
    silent = [c.name for c in candidates if c.hint.importance is None]
    if len(silent) == len(candidates):
        raise InputError(
            "these hints have no importance and no KL curves, so no precision follows from them: "
            "make full hints with tierhints collect"
        )
    if silent:
        lost.append(f"no signal for {list_some(silent)}: kept at the most precise type")
    curves = {}
    for candidate in candidates:
        importance, options = candidate.hint.importance, allowed[candidate.name]
        if importance is None:
            curves[candidate.name] = {p: 0.0 if p is options[0] else _PROHIBITIVE for p in options}
            continue
        mass = importance * candidate.num_params
        curves[candidate.name] = {p: mass * 4.0 ** -_nominal_bits(p) for p in options}
    return curves, "importance", tuple(lost)


def _report(
    candidates: Sequence[Candidate],
    chosen: Mapping[str, Precision],
    basis: str,
    lost: tuple[str, ...] = (),
) -> Widths:
    num_params = sum(candidate.num_params for candidate in candidates)
    known = all(chosen[c.name] in c.hint.kl for c in candidates)
    return Widths(
        precisions=dict(chosen),
        basis=basis,
        bits=sum(c.sizes[chosen[c.name]] for c in candidates) / num_params,
        predicted_kl=sum(c.hint.kl[chosen[c.name]] for c in candidates) if known else None,
        lost=lost,
    )


def _nominal_bits(precision: Precision) -> int:
    return int("".join(filter(str.isdigit, precision)))
