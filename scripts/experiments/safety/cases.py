"""The cases: small models whose resident output is known, and what happens to their files.

Every model is a stack of a few layers, so that some of it stays in fast memory and some does not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_WIDTH = 64
_NUM_LAYERS = 4
_VOCAB_SIZE = 100
_FLIPPED_BIT = 0x40
"""In the last byte of an fp32 number: the highest bit of its exponent."""


class Layer(nn.Module):
    """A residual MLP (B, T, W) -> (B, T, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.expand = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.contract = nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return x_BTW + self.contract(functional.gelu(self.expand(self.norm(x_BTW))))


class FunctionalLayer(Layer):
    """Computes with the weights of a child that is never called."""

    def forward(self, x_BTW: Tensor) -> Tensor:
        hidden = functional.linear(self.norm(x_BTW), self.expand.weight)
        return x_BTW + self.contract(functional.gelu(hidden))


class BufferedLayer(Layer):
    """Computes with a persistent and a non-persistent buffer."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(_WIDTH) + 0.5)
        self.register_buffer("shift", torch.randn(_WIDTH), persistent=False)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return super().forward(x_BTW * self.scale + self.shift)


class StatisticsLayer(Layer):
    """Computes with batch statistics, persistent buffers that training has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(_WIDTH)
        torch.nn.init.normal_(self.statistics.running_mean)  # type: ignore[arg-type]

    def forward(self, x_BTW: Tensor) -> Tensor:
        return super().forward(self.statistics(x_BTW.transpose(1, 2)).transpose(1, 2))


class Stack(nn.Module):
    """Layers one after another, or those of ``order``."""

    def __init__(self, layer: type[Layer] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(_NUM_LAYERS))

    def forward(self, x_BTW: Tensor, order: Sequence[int] | None = None) -> Tensor:
        for index in range(_NUM_LAYERS) if order is None else order:
            x_BTW = self.layers[index](x_BTW)
        return x_BTW


class TiedStack(Stack):
    """Token ids (B, T) -> logits (B, T, V); the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCAB_SIZE, _WIDTH)
        self.head = nn.Linear(_WIDTH, _VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x_BTW: Tensor, order: Sequence[int] | None = None) -> Tensor:
        out: Tensor = self.head(super().forward(self.embed(x_BTW), order))
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyCase:
    """A model, the calls made on it, and perhaps a file accident.

    ``reused``: another model was offloaded into the folder before. ``damage`` changes a file of
    weights while the model is offloaded; with ``between_runs`` it does so after a first run, and
    the model is offloaded into the same folder again. ``from_checkpoint``: the model is built
    without weights, and they come from its safetensors file.
    """

    name: str
    build: Callable[[], nn.Module] = Stack
    calls: Sequence[Mapping[str, Any]] = ({}, {}, {})
    reused: bool = False
    damage: Callable[[Path], None] | None = None
    between_runs: bool = False
    from_checkpoint: bool = False

    def make_model(self, seed: int) -> nn.Module:
        """Return the model with weights of this seed."""
        torch.manual_seed(seed)
        return self.build().eval()

    def make_input(self) -> Tensor:
        """Return what the model is called with."""
        random = torch.Generator().manual_seed(0)
        if self.build is TiedStack:
            return torch.randint(_VOCAB_SIZE, (2, 8), generator=random)
        return torch.randn(2, 8, _WIDTH, generator=random)


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file, in place: of a number's exponent where there is one."""
    position = path.stat().st_size // 8 * 4 + 3
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ _FLIPPED_BIT]))


def truncate(path: Path) -> None:
    """Cut a file in half, in place."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


CASES = (
    SafetyCase(name="reused folder", reused=True),
    SafetyCase(name="flipped byte", damage=flip_bit),
    SafetyCase(name="flipped byte, next run", damage=flip_bit, between_runs=True),
    SafetyCase(name="truncated file", damage=truncate),
    SafetyCase(name="truncated file, next run", damage=truncate, between_runs=True),
    SafetyCase(name="functional use", build=lambda: Stack(FunctionalLayer)),
    SafetyCase(name="tied weights", build=TiedStack),
    SafetyCase(name="buffers", build=lambda: Stack(BufferedLayer)),
    SafetyCase(
        name="batch statistics of a checkpoint",
        build=lambda: Stack(StatisticsLayer),
        from_checkpoint=True,
    ),
    SafetyCase(
        name="skipped modules",
        calls=({"order": (0, 3)}, {}, {"order": (1, 2)}, {"order": (2, 3)}, {}),
    ),
    SafetyCase(
        name="repeated modules",
        calls=({"order": (0, 1, 0, 2, 2, 3)}, {"order": (3, 2, 1, 0)}, {"order": (1, 1, 0, 3)}),
    ),
)
