"""What a signal is: from a model and text, how much the output depends on each block.

Registered ones are what ``tierhints collect --signal`` offers; docs/extending.md shows how to add
one, and tests/unit/signals/test_every_signal.py is the suite that each passes. Signals that need
more than a model and text (``adam``: an optimizer) make their hints without a registration.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from ..blocks import partition_model, unique_parameters, unwrap_model
from ..errors import InputError
from ..hints import Hints
from ..registry import Registry
from .summary import (
    SignalValue,
    block_masses,
    dtype_names,
    make_hints,
    packed_parameters,
    sum_elements,
)

_NAME = re.compile(r"[a-z][a-z0-9_]*")
"""As tier_hints.schema.json has it."""
Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a signal found. By block, each of the model's: ``mass``, the sum over its weights, and
    ``density``, the mean per weight, which ranks (None: no signal); ``signals``: name -> value, for
    the file. ``provenance`` says what was measured and how, by ``signal`` at least.
    """

    mass: Mapping[str, float]
    density: Mapping[str, float | None]
    signals: Mapping[str, Mapping[str, SignalValue]]
    provenance: Mapping[str, Any]


class Signal(Protocol):
    """Made without arguments. ``name``: lower-case letters, digits and _."""

    name: ClassVar[str]

    def measure(
        self, model: nn.Module, batches: Iterable[Tensor], *, progress: Progress | None = None
    ) -> Measurement:
        """Measure a causal language model in evaluation mode on token ids (B, T), and leave it as
        it was; ``progress`` is called with the number of sequences done. Densities are finite and
        not negative, and the same for the same model and text.
        """


class ElementwiseSignal(ABC):
    """A signal with a number for every weight: says ``values`` and inherits the rest."""

    name: ClassVar[str]

    @abstractmethod
    def values(self, model: nn.Module, batches: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield names of parameters (``blocks.unique_parameters``) and numbers of their shape, not
        negative; what comes of a parameter again, say of each batch, is added. ``batches`` are on
        the model's device.
        """

    def measure(
        self, model: nn.Module, batches: Iterable[Tensor], *, progress: Progress | None = None
    ) -> Measurement:
        """Add the numbers up by block; a block's density is the mean of those of its weights that
        have one.
        """
        model = unwrap_model(model)
        blocks, parameters = partition_model(model), unique_parameters(model)
        packed = packed_parameters(blocks)
        device = next(iter(parameters.values())).device
        read = {"tokens": 0, "sequences": 0}

        def counted() -> Iterator[Tensor]:
            for batch in batches:
                yield batch.to(device)
                read["tokens"] += batch.numel()
                read["sequences"] += len(batch)
                if progress is not None:
                    progress(len(batch))

        sums: dict[str, Tensor] = {}
        for name, values in self.values(model, counted()):
            self._check(name, values, parameters)
            mass = sum_elements(values, per_expert=name in packed)
            sums[name] = sums[name] + mass if name in sums else mass
        if not sums:
            raise InputError(f"signal {self.name} gave no numbers: yield some parameter's")
        masses = block_masses(blocks, sums)
        counts = {
            block.name: sum(each.num_params for each in block.pieces if each.parameter in sums)
            for block in blocks
        }
        density = {name: masses[name] / count if count else None for name, count in counts.items()}
        return Measurement(
            mass=masses,
            density=density,
            signals={
                name: {} if mean is None else {self.name: mean, f"{self.name}_sum": masses[name]}
                for name, mean in density.items()
            },
            provenance={"signal": self.name, **read, "dtype": dtype_names(model)},
        )

    def _check(self, name: str, values: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        if name not in parameters:
            raise InputError(
                f"signal {self.name} gave numbers of {name!r}: the model has no such parameter; "
                f"it has {', '.join(list(parameters)[:3])}, ..."
            )
        if values.shape != parameters[name].shape:
            raise InputError(
                f"signal {self.name} gave {name!r} numbers of shape {tuple(values.shape)}: give "
                f"one for each weight, {tuple(parameters[name].shape)}"
            )
        if not bool((values >= 0).all() & values.isfinite().all()):
            raise InputError(
                f"signal {self.name} gave {name!r} a number that is negative or not finite"
            )


SIGNALS: Registry[type[Signal]] = Registry("signal")
SignalClass = TypeVar("SignalClass", bound=type[Signal])


def register_signal(signal: SignalClass) -> SignalClass:
    """Offer a class to ``tierhints collect --signal`` by its name: a decorator."""
    if not _NAME.fullmatch(signal.name):
        raise InputError(f"signal {signal.name!r}: a name has lower-case letters, digits and _")
    SIGNALS.add(signal.name, signal)
    return signal


def signal_hints(
    found: Measurement,
    model: nn.Module,
    *,
    model_id: str,
    revision: str = "",
    hbm_threshold: float,
    cpu_threshold: float,
    extra_signals: Mapping[str, Mapping[str, SignalValue]] | None = None,
    extra_provenance: Mapping[str, Any] | None = None,
) -> Hints:
    """Make hints from a measurement of ``model``; blocks are ranked by density.

    ``extra_signals``: block -> name -> value, written beside; ``extra_provenance``: added to the
    provenance. Raises InputError for a measurement of other blocks.
    """
    blocks = partition_model(model)
    if found.density.keys() != {block.name for block in blocks}:
        raise InputError(
            f"the {found.provenance['signal']} measurement is of another model: its blocks have "
            "other names"
        )
    return make_hints(
        model,
        blocks,
        model_id=model_id,
        revision=revision,
        provenance={**found.provenance, **(extra_provenance or {})},
        density=found.density,
        signals=found.signals,
        reasons={},
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        extra_signals=extra_signals,
    )
