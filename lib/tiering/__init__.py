"""Running a model under a plan: tier specs, stores, transfer, emulation and the hooks that tie them
to a module.
"""

from ..checkpoint.empty import empty_weights
from ..checkpoint.load import load
from ..machine import DEFAULT_SPECS, TierSpec
from ..signals import AdamStateTierAnalyzer
from .attach import attach
from .runtime import Runtime
from .telemetry import BlockStats, Stats
from .transfer.specs import Clock, EmulationSpec, load_specs, save_specs, specs_to_json

__all__ = [
    "DEFAULT_SPECS",
    "AdamStateTierAnalyzer",
    "BlockStats",
    "Clock",
    "EmulationSpec",
    "Runtime",
    "Stats",
    "TierSpec",
    "attach",
    "empty_weights",
    "load",
    "load_specs",
    "save_specs",
    "specs_to_json",
]
