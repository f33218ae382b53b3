"""Running a model under a plan: tier specs, stores, transfer, emulation and the hooks that tie them
to a module.
"""

from ..signals import AdamStateTierAnalyzer
from .hooks import Runtime, attach
from .specs import (
    DEFAULT_SPECS,
    Clock,
    EmulationSpec,
    TierSpec,
    load_specs,
    save_specs,
    specs_to_json,
)
from .telemetry import BlockStats, Stats

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
    "load_specs",
    "save_specs",
    "specs_to_json",
]
