"""Which weight is at fault when numbers aren't finite, or a precision can't hold them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from . import Block, partition_model, unique_parameters


def find_fault(model: nn.Module) -> str | None:
    """Describe the first weight in memory that is NaN or infinite; None where all are finite."""
    for name, parameter in unique_parameters(model).items():
        if parameter.device.type != "meta" and parameter.is_floating_point():
            bad = ~parameter.detach().isfinite()
            if bool(bad.any()):
                return f"{describe_fault(name, partition_model(model), bad)} NaN or infinite"
    return None


def describe_fault(name: str, blocks: Iterable[Block], bad: Tensor, *, first_row: int = 0) -> str:
    """Name a parameter, its block, and the place of the first of its weights that is ``bad``.

    ``bad``: bool in the parameter's shape, or of its rows from ``first_row`` on, with one True at
    least. The caller ends the sentence.
    """
    place = [int(index) for index in bad.nonzero()[0]]
    if place:
        place[0] += first_row
    block = next(
        block.name
        for block in blocks
        for piece in block.pieces
        if piece.parameter == name and piece.expert in (None, *place[:1])
    )
    count = int(bad.sum())
    weights = "a weight" if count == 1 else f"{count} weights, the first"
    return f"parameter {name!r} of block {block!r} holds {weights} at {place} that is"


@contextmanager
def blaming_weights(model: nn.Module) -> Iterator[None]:
    """Add to a FloatingPointError the weight at fault, if there is one."""
    try:
        yield
    except FloatingPointError as error:
        fault = find_fault(model)
        if fault is None:
            raise
        raise FloatingPointError(f"{error}: {fault}") from error
