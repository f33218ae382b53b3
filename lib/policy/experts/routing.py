"""What a mixture's routers chose, call by call: the recorded steps that policies are judged on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """What one token used of one layer, best first; ``step`` is its place in the context.

    ``turn`` counts prompts with their answers, ``decode`` says whether the token was an answer's.
    """

    turn: int
    decode: bool
    step: int
    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...] | None = None


class Call(NamedTuple):
    """One pass over a layer: a decode step, of one token, or a prompt with all of its tokens."""

    layer: int
    tokens: tuple[tuple[int, ...], ...]
    decode: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A recording. By layer: how many experts it has, how many a token uses, bytes of each.

    Layers without experts don't appear. ``expert_bytes`` are 1 where the recording has no sizes.
    """

    model: str
    experts: Mapping[int, int]
    per_token: Mapping[int, int]
    expert_bytes: Mapping[int, int]
    cells: tuple[Cell, ...]

    @property
    def num_experts(self) -> int:
        """All experts of all layers."""
        return sum(self.experts.values())

    @property
    def decode_steps(self) -> int:
        """Tokens decoded."""
        return len({(cell.turn, cell.step) for cell in self.cells if cell.decode})

    def calls(self) -> tuple[Call, ...]:
        """Return the passes in the order they were made.

        Turn after turn: the prompt layer by layer, as one batch goes through the model, then step
        after step, each layer by layer.
        """
        prompts: dict[tuple[int, int], list[Cell]] = {}
        steps = []
        for cell in self.cells:
            if cell.decode:
                steps.append(cell)
            else:
                prompts.setdefault((cell.turn, cell.layer), []).append(cell)
        placed = [
            (
                (turn, False, 0, layer),
                Call(layer, tuple(cell.experts for cell in sorted(cells, key=_step)), False),
            )
            for (turn, layer), cells in prompts.items()
        ]
        placed += [
            ((cell.turn, True, cell.step, cell.layer), Call(cell.layer, (cell.experts,), True))
            for cell in steps
        ]
        return tuple(call for _, call in sorted(placed, key=lambda entry: entry[0]))


def _step(cell: Cell) -> int:
    return cell.step
