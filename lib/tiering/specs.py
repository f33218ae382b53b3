"""What a tier costs in emulation: setup time and bandwidth, defaults, and the file that declares
others.

File: ``{"clock": "virtual" | "wall", "tiers": {"CPU": {"setup_us": 2, "bandwidth_gb_s": 400,
"name": "CXL"}, ...}}``. A tier that the file leaves out keeps its default; ``name`` labels what
stands in for the tier.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import parse_json, write_json
from ..hints import Tier
from ..units import GB


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_MAX_SETUP_US = 1e9
_MIN_BANDWIDTH_GB_S = 1e-6
"""Bounds beyond which a wait is no experiment but a hang: 1000 s, and 1 kB/s."""


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A tier's cost model: a transfer of n bytes takes ``setup_us`` microseconds plus n /
    (``bandwidth_gb_s`` * 1e9) s.
    """

    name: str
    setup_us: float
    bandwidth_gb_s: float

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing; raises InputError."""
        if not (_is_number(self.setup_us) and 0 <= self.setup_us <= _MAX_SETUP_US):
            raise InputError(
                f"tier {self.name}: setup_us {self.setup_us!r} must be a number of microseconds "
                f"in [0, {_MAX_SETUP_US:g}]"
            )
        if not (
            _is_number(self.bandwidth_gb_s)
            and _MIN_BANDWIDTH_GB_S <= self.bandwidth_gb_s < math.inf
        ):
            raise InputError(
                f"tier {self.name}: bandwidth_gb_s {self.bandwidth_gb_s!r} must be a number of "
                f"GB/s, {_MIN_BANDWIDTH_GB_S:g} or more"
            )

    def transfer_seconds(self, num_bytes: int) -> float:
        """Return the seconds that moving ``num_bytes`` out of this tier takes."""
        return self.setup_us * 1e-6 + num_bytes / (self.bandwidth_gb_s * GB)


class Clock(StrEnum):
    """How emulated time passes: added up (virtual), or really waited for (wall)."""

    VIRTUAL = "virtual"
    WALL = "wall"


DEFAULT_SPECS: Mapping[Tier, TierSpec] = {
    Tier.HBM: TierSpec("HBM", 1.0, 800.0),
    Tier.CPU: TierSpec("CPU", 5.0, 150.0),
    Tier.CXL: TierSpec("CXL", 2.0, 400.0),
    Tier.SSD: TierSpec("SSD", 30.0, 10.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulationSpec:
    """The hypothetical machine that emulated mode charges for."""

    specs: Mapping[Tier, TierSpec] = field(default_factory=lambda: dict(DEFAULT_SPECS))
    clock: Clock = Clock.VIRTUAL


def load_specs(path: str | Path) -> EmulationSpec:
    """Read an emulation file; raises InputError naming the entry that is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"spec file {path} can't be read ({error}): give JSON of tiers") from error
    try:
        return _parse_specs(parse_json(text))
    except InputError as error:
        raise InputError(f"spec file {path}: {error}") from error


def specs_to_json(spec: EmulationSpec) -> dict[str, Any]:
    """Return the document that ``load_specs`` reads."""
    return {
        "clock": str(spec.clock),
        "tiers": {
            str(tier): {
                "name": tier_spec.name,
                "setup_us": tier_spec.setup_us,
                "bandwidth_gb_s": tier_spec.bandwidth_gb_s,
            }
            for tier, tier_spec in spec.specs.items()
        },
    }


def save_specs(spec: EmulationSpec, path: str | Path) -> None:
    """Write the file that ``load_specs`` reads, atomically."""
    write_json(specs_to_json(spec), path)


def _parse_specs(document: Any) -> EmulationSpec:
    if (
        not isinstance(document, dict)
        or not isinstance(document.get("tiers"), dict)
        or set(document) - {"clock", "tiers"}
    ):
        raise InputError(
            'expected {"clock": "virtual" | "wall", '
            '"tiers": {TIER: {"setup_us": .., "bandwidth_gb_s": ..}}}'
        )
    clock = document.get("clock", Clock.VIRTUAL)
    if clock not in list(Clock):
        raise InputError(f"clock {clock!r} is unknown; allowed: {', '.join(Clock)}")
    specs = dict(DEFAULT_SPECS)
    for name, entry in document["tiers"].items():
        if name not in list(Tier):
            raise InputError(f"unknown tier {name!r}; allowed: {', '.join(Tier)}")
        if not isinstance(entry, dict) or not {"setup_us", "bandwidth_gb_s"} <= set(entry) <= {
            "name",
            "setup_us",
            "bandwidth_gb_s",
        }:
            raise InputError(
                f"tier {name}: expected setup_us, bandwidth_gb_s and, if you like, name"
            )
        specs[Tier(name)] = TierSpec(
            str(entry.get("name", name)), entry["setup_us"], entry["bandwidth_gb_s"]
        )
    return EmulationSpec(specs=specs, clock=Clock(clock))
