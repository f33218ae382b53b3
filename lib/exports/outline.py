"""What an exporter may know of a model: names, sizes and hints of its weights. No torch here.

``model.py`` makes an outline of an nn.Module. An exporter turns it into the files of another tool,
and says beside them what that tool can't express.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..hints import BlockHint


class MatrixKind(StrEnum):
    """How a matrix lies in memory, and what may be done with it."""

    LINEAR = "linear"  # nn.Linear: (out, in)
    CONV1D = "conv1d"  # transformers' Conv1D of GPT-2: (in, out)
    EMBEDDING = "embedding"  # (rows, in)
    EXPERTS = "experts"  # packed: (experts, out, in)
    EXPERTS_TRANSPOSED = "experts_transposed"  # packed: (experts, in, out)
    OTHER = "other"  # norms, biases, positions, convolutions


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A parameter, or one expert's slice of it. ``shape`` is that of the whole parameter."""

    name: str
    module: str
    layout: MatrixKind
    shape: tuple[int, ...]
    num_params: int
    num_bytes: int
    expert: int | None = None
    tied: bool = False

    @property
    def row_length(self) -> int:
        """Weights that one output (or one embedded token) multiplies: the input's width."""
        by_columns = self.layout in (MatrixKind.CONV1D, MatrixKind.EXPERTS_TRANSPOSED)
        return self.shape[-2 if by_columns else -1]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlineBlock:
    """A block with its hint. ``modules[0]`` owns the weights, the others are tied to them."""

    name: str
    layer: int | None
    modules: tuple[str, ...]
    weights: tuple[Weight, ...]
    hint: BlockHint

    @property
    def num_bytes(self) -> int:
        """Weight bytes in the model's own dtype."""
        return sum(weight.num_bytes for weight in self.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model without its weights. ``modules`` are all names; ``whole`` those of the modules that
    the model's author wants on one device (``_no_split_modules``); ``buffers`` those that hold
    buffers and no weights.
    """

    model_type: str
    class_name: str
    num_layers: int
    blocks: tuple[OutlineBlock, ...]
    modules: frozenset[str]
    whole: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """All weight bytes, a tied weight once."""
        return sum(block.num_bytes for block in self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An export: file name -> content, figures to report, commands that use the files, and what the
    tool can't express.
    """

    files: Mapping[str, str | bytes]
    summary: Mapping[str, object]
    commands: tuple[str, ...]
    lost: tuple[str, ...]


def list_some(names: Iterable[str]) -> str:
    """Print the first names of many."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
