"""Running a model under a plan: the only room that touches devices, files and clocks.

``attach`` makes a ``Runtime``. From top to bottom: ``planning`` says what goes where, ``hooks`` run
the model, ``residency`` holds its weights, ``transfer`` brings them in, ``stores`` keep the bytes
that ``payload`` lays out; ``probe`` measures the machine. Decisions themselves are in ``policy``.
"""

from ..checkpoint.empty import empty_weights
from ..checkpoint.load import load
from ..machine import DEFAULT_SPECS, TierSpec
from ..signals import AdamStateTierAnalyzer
from .attach import attach
from .planning.planned import Planned, plan
from .runtime import Runtime
from .telemetry import BlockStats, Stats
from .transfer.specs import Clock, EmulationSpec, load_specs, save_specs, specs_to_json

__all__ = [
    "DEFAULT_SPECS",
    "AdamStateTierAnalyzer",
    "BlockStats",
    "Clock",
    "EmulationSpec",
    "Planned",
    "Runtime",
    "Stats",
    "TierSpec",
    "attach",
    "empty_weights",
    "load",
    "load_specs",
    "plan",
    "save_specs",
    "specs_to_json",
]
