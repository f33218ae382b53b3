"""Signals: how much a model's output depends on each block, and the hints made from that.

``adam`` reads the optimizer's second moment, ``from_checkpoint`` that of a state on disk,
``fisher`` measures Fisher information on text, ``attention`` describes attention probabilities,
``callback`` brings ``adam`` to the Hugging Face Trainer. ``interface`` says what a signal of one's
own has to be. Importing this package doesn't import transformers.
"""

from typing import TYPE_CHECKING, Any

from .adam import adam_hints, collect_adam_signal
from .analyzer import AdamStateTierAnalyzer
from .attention import attention_fim_trace
from .collect import collect_fisher, collect_hints
from .fisher import FisherResult, FisherTrace, fisher_hints, measure_fisher, save_fisher_diagonal
from .from_checkpoint import hints_from_checkpoint
from .gradients import FisherLabels
from .interface import (
    ElementwiseSignal,
    Measurement,
    Signal,
    register_signal,
    signal_hints,
)
from .moment_signal import AdamSignal
from .router import RouterCounter, RouterCounts, router_signals
from .scale import MomentScale
from .summary import reshard

if TYPE_CHECKING:
    from .callback import TierHintsCallback

__all__ = [
    "AdamSignal",
    "AdamStateTierAnalyzer",
    "ElementwiseSignal",
    "FisherLabels",
    "FisherResult",
    "FisherTrace",
    "Measurement",
    "RouterCounter",
    "RouterCounts",
    "MomentScale",
    "Signal",
    "TierHintsCallback",
    "adam_hints",
    "attention_fim_trace",
    "collect_adam_signal",
    "collect_fisher",
    "collect_hints",
    "measure_fisher",
    "fisher_hints",
    "hints_from_checkpoint",
    "register_signal",
    "router_signals",
    "reshard",
    "save_fisher_diagonal",
    "signal_hints",
]


def __getattr__(name: str) -> Any:
    # The callback subclasses transformers.TrainerCallback: import it only for those who ask for it.
    if name == "TierHintsCallback":
        from .callback import TierHintsCallback

        return TierHintsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
