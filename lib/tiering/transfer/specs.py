"""What a tier costs in emulation: setup time and bandwidth, defaults, and the file that declares
others.

File: ``{"clock": "virtual" | "wall", "tiers": {"CPU": {"setup_us": 2, "bandwidth_gb_s": 400,
"name": "CXL"}, ...}}``. A tier that the file leaves out keeps its default; ``name`` labels what
stands in for the tier.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import parse_json, write_json
from ...machine import DEFAULT_SPECS, TierSpec
from ...policy.plan import Plan
from ...vocabulary import Tier


class Clock(StrEnum):
    """How emulated time passes: added up (virtual), or really waited for (wall)."""

    VIRTUAL = "virtual"
    WALL = "wall"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulationSpec:
    """The hypothetical machine that emulated mode charges for."""

    specs: Mapping[Tier, TierSpec] = field(default_factory=lambda: dict(DEFAULT_SPECS))
    clock: Clock = Clock.VIRTUAL
    contention: float = 0.0
    """By what share compute is slower while a link is busy: both want cores and memory bandwidth.
    Measured by ``FileProbe.measure_contention``; 0 for links that don't take part of either.
    """
    charge_hbm: bool = True
    """Charge each use of weights in HBM too, as for a device that this machine doesn't have. Not
    for a measured machine, whose compute already takes the time of its own memory.
    """

    def check(self, plan: Plan) -> None:
        """Refuse a plan with a tier that the machine lacks; raises InputError."""
        tiers = {placement.tier for placement in plan.placements.values()}
        if not self.charge_hbm:
            tiers.discard(Tier.HBM)
        if missing := tiers - self.specs.keys():
            raise InputError(
                f"tier {min(missing)} has no emulation spec: add it to the spec file's tiers"
            )


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
