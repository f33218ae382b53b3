"""Tierhints: training signals turned into where, and how precisely, inference keeps weights.

Every folder and file here is a room; docs/architecture.md says what lives in which. Imports go
downwards only, in the order that ``tests/unit/test_imports.py`` holds. The names below are for
users, docs/api.md shows each; they are imported when they are first asked for, so that
``import tierhints`` takes no time and ``tierhints.load_hints`` no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.load import load
    from .errors import InputError, PlacementError
    from .evaluation.calibration import calibrate
    from .evaluation.canary import measure_kl
    from .evaluation.evaluate import evaluate
    from .evaluation.generate import generate
    from .exports.tools import export
    from .hints import load_hints, save_hints
    from .progressive.attach import attach
    from .signals.analyzer import AdamStateTierAnalyzer
    from .signals.callback import TierHintsCallback
    from .signals.collect import collect_fisher
    from .signals.from_checkpoint import hints_from_checkpoint
    from .text.held_out import read_tokens
    from .tiering.planning.planned import plan

__all__ = [
    "AdamStateTierAnalyzer",
    "InputError",
    "PlacementError",
    "TierHintsCallback",
    "attach",
    "calibrate",
    "collect_fisher",
    "evaluate",
    "export",
    "generate",
    "hints_from_checkpoint",
    "load",
    "load_hints",
    "measure_kl",
    "plan",
    "read_tokens",
    "save_hints",
]

_MODULES = {
    "AdamStateTierAnalyzer": "signals.analyzer",
    "InputError": "errors",
    "PlacementError": "errors",
    "TierHintsCallback": "signals.callback",
    "attach": "progressive.attach",
    "calibrate": "evaluation.calibration",
    "collect_fisher": "signals.collect",
    "evaluate": "evaluation.evaluate",
    "export": "exports.tools",
    "generate": "evaluation.generate",
    "hints_from_checkpoint": "signals.from_checkpoint",
    "load": "checkpoint.load",
    "load_hints": "hints",
    "measure_kl": "evaluation.canary",
    "plan": "tiering.planning.planned",
    "read_tokens": "text.held_out",
    "save_hints": "hints",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULES[name]}", __name__)
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if __name__ == "lib":  # by the folder's name, in a checkout: the package is tierhints all the same
    import sys
    from pathlib import Path

    from .alias import alias_package

    del sys.modules[f"{__name__}.alias"]  # from now on it is that of tierhints
    alias_package(__name__, Path(__file__).parent)
