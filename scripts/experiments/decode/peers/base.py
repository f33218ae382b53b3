"""What a compared system is, ours or a peer: one class in one file of this folder, registered.

``load`` runs in a worker process and imports inside what it needs: llama.cpp's worker may be an
interpreter without torch. A session computes only while it is asked something.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from lib.registry import Registry

EAGER = "eager"
COMPILED = "compiled"
NATIVE = "native"
"""How a system runs: as Python calls it, by torch.compile, or as the program that it is."""
WARM_UP_STEPS = 2
"""Steps that aren't timed at each turn: other processes' threads have stopped spinning by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is to load: a checkpoint held in a ``width``. ``folder``: for files that a
    system makes of it. ``hints``: for plans within an epsilon.
    """

    checkpoint: Path
    folder: Path
    width: str
    threads: int
    hints: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the task as a document."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Task":
        """Return the task of a document."""
        hints = document["hints"]
        return cls(
            checkpoint=Path(document["checkpoint"]),
            folder=Path(document["folder"]),
            width=document["width"],
            threads=document["threads"],
            hints=None if hints is None else Path(hints),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of the matrices: all that are held, and those that a decoding step reads as a whole.
    An embedding that isn't the head, too, is held and not read: a step takes rows of it.
    """

    held_bytes: int
    read_bytes: int


class Session(ABC):
    """A model ready to compute."""

    sizes: Sizes

    @abstractmethod
    def prepare(self, mode: str, ids_BT: NDArray[np.int64], steps: int) -> None:
        """Compute a context, with room for ``steps`` tokens after it, and warm up. What the mode
        had prepared before goes.
        """

    @abstractmethod
    def decode(self, mode: str, steps: int) -> list[float]:
        """Go back to the prepared context and take ``steps`` greedy steps of a token for each
        sequence; return the seconds of all but the first ``WARM_UP_STEPS``.
        """

    @abstractmethod
    def prefill(self, ids_T: NDArray[np.int64]) -> float:
        """Compute a prompt as far as its last token's logits; return the seconds."""

    @abstractmethod
    def logits(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits (T, V) of every position of one sequence."""


class System(ABC):
    """A way of running a model. ``widths``: the forms in which it holds weights; ``modes``: the
    ways in which it decodes; ``package``: what must be installed, and ``install`` how. One that
    isn't ``on_torch`` may have an interpreter of its own.
    """

    name: ClassVar[str]
    widths: ClassVar[Sequence[str]]
    modes: ClassVar[Sequence[str]] = (EAGER, COMPILED)
    package: ClassVar[str] = "torch"
    install: ClassVar[str] = "pip install torch"
    on_torch: ClassVar[bool] = True

    @abstractmethod
    def load(self, task: Task) -> Session:
        """Return the model ready to compute."""

    def needs_hints(self, width: str) -> bool:
        """Say whether a width is made from hints."""
        return False


SYSTEMS: Registry[System] = Registry("system")
"""By name; the first one's first width is the model that others are compared with."""
SystemClass = TypeVar("SystemClass", bound=type[System])


def register_system(system: SystemClass) -> SystemClass:
    """Let a class be compared: a decorator."""
    SYSTEMS.add(system.name, system())
    return system
