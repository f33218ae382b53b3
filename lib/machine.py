"""What a machine can do: a cost model and a capacity for each tier, and compute rates. No torch.

``machine.json`` holds one such profile, measured by a probe, or written by hand for a machine that
isn't there; docs/machine.md describes the file, and says where this machine's own one is found.
"""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import cache_folder, parse_json, write_json
from .units import GB, parse_bytes
from .vocabulary import Precision, Tier

FORMAT_VERSION = 1
_MAX_SETUP_US = 1e9
_MIN_BANDWIDTH_GB_S = 1e-6
"""Bounds beyond which a wait is no experiment but a hang: 1000 s, and 1 kB/s."""


def cpu_name() -> str:
    """Return the processor's name as Linux gives it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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


DEFAULT_SPECS: Mapping[Tier, TierSpec] = {
    Tier.HBM: TierSpec("HBM", 1.0, 800.0),
    Tier.CPU: TierSpec("CPU", 5.0, 150.0),
    Tier.CXL: TierSpec("CXL", 2.0, 400.0),
    Tier.SSD: TierSpec("SSD", 30.0, 10.0),
}
"""What emulated mode charges where neither a machine nor a spec says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineProfile:
    """A machine. It has the tiers that are listed; a tier without a capacity has no limit.

    ``compute`` has, by precision, the weights per second that a product with few rows gets through.
    ``measured`` says whether the numbers come from a probe of this very machine.
    """

    name: str
    tiers: Mapping[Tier, TierSpec]
    capacity_bytes: Mapping[Tier, int] = field(default_factory=dict)
    compute: Mapping[str, float] = field(default_factory=dict)
    measured: bool = False

    def __post_init__(self) -> None:
        """Refuse a profile that means nothing; raises InputError."""
        if not self.tiers:
            raise InputError("a machine needs at least one tier, such as SSD")
        for tier, capacity in self.capacity_bytes.items():
            if tier not in self.tiers:
                raise InputError(f"tier {tier} has a capacity and no bandwidth: give both")
            if capacity < 0:
                raise InputError(f"tier {tier}: capacity_bytes {capacity} must be 0 or more")
        for precision, rate in self.compute.items():
            if precision not in list(Precision):
                raise InputError(
                    f"compute of {precision!r}: no such precision; allowed: {', '.join(Precision)}"
                )
            if not (_is_number(rate) and 0 < rate < math.inf):
                raise InputError(
                    f"compute of {precision}: {rate!r} must be weights per second, more than 0"
                )


UNMEASURED = MachineProfile(
    name="a machine not measured",
    tiers={
        Tier.HBM: DEFAULT_SPECS[Tier.HBM],
        Tier.CPU: TierSpec("CPU", 10, 12),
        Tier.CXL: TierSpec("CXL", 2, 20),
        Tier.SSD: TierSpec("SSD", 150, 2.5),
    },
)
"""What plans assume of a machine that was not probed. Of two plans the one for a faster disk
spreads its transfers, and is a few percent longer on a slower one; the other way round it may stall
for half of the pass.
"""

MACHINE_VARIABLE = "TIERHINTS_MACHINE"
"""Names the file of this machine; empty: there is none, plan as for one that was not measured."""


def machine_path() -> Path | None:
    """Return where the file of this machine is, or is to be written: where $TIERHINTS_MACHINE says,
    else in the user's cache folder. None: the variable is empty.
    """
    given = os.environ.get(MACHINE_VARIABLE)
    if given is not None:
        return Path(given) if given else None
    return cache_folder() / "machine.json"


def find_machine() -> MachineProfile | None:
    """Read the file of this machine; None where it was not probed. Raises InputError for a file
    that isn't right, or that $TIERHINTS_MACHINE names and isn't there.
    """
    path = machine_path()
    if path is None or not (path.exists() or MACHINE_VARIABLE in os.environ):
        return None
    return load_machine(path)


def choose_machine(given: MachineProfile | str | Path | None) -> MachineProfile:
    """Return the machine to plan for: the one that is given, else this one as it was probed, else
    one that was not measured.
    """
    if isinstance(given, MachineProfile):
        return given
    return load_machine(given) if given is not None else find_machine() or UNMEASURED


def fit_tier(name: str, points: Sequence[tuple[int, float]]) -> TierSpec:
    """Fit setup time and bandwidth to measured (bytes, seconds), at least one pair.

    Least squares of seconds = setup + slope * bytes, weighted with 1 / seconds: a long transfer is
    a sum of short ones, and so is the variance of its time. Where the points show no setup time,
    the line goes through the origin.
    """
    assert points
    assert all(num_bytes > 0 and seconds > 0 for num_bytes, seconds in points)
    w = sum(1 / seconds for _, seconds in points)
    wn = sum(num_bytes / seconds for num_bytes, seconds in points)
    wnn = sum(num_bytes**2 / seconds for num_bytes, seconds in points)
    wt, wnt = len(points), sum(num_bytes for num_bytes, _ in points)
    setup, slope = 0.0, wnt / wnn
    determinant = w * wnn - wn * wn
    if determinant > 1e-9 * w * wnn:  # else all transfers have one size
        fitted_setup = (wt * wnn - wnt * wn) / determinant
        fitted_slope = (wnt * w - wt * wn) / determinant
        if fitted_setup > 0 and fitted_slope > 0:
            setup, slope = fitted_setup, fitted_slope
    return TierSpec(name, setup * 1e6, 1 / slope / GB)


def load_machine(path: str | Path) -> MachineProfile:
    """Read a machine file; raises InputError naming the entry that is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"machine file {path} can't be read ({error}): measure one with tierhints probe, or "
            "write one as docs/machine.md says"
        ) from error
    try:
        return machine_from_json(parse_json(text))
    except InputError as error:
        raise InputError(f"machine file {path}: {error}") from error


def save_machine(machine: MachineProfile, path: str | Path) -> None:
    """Write the file that ``load_machine`` reads, atomically."""
    write_json(machine_to_json(machine), path)


def machine_to_json(machine: MachineProfile) -> dict[str, Any]:
    """Return the document that ``machine_from_json`` reads."""
    return {
        "format_version": FORMAT_VERSION,
        "name": machine.name,
        "measured": machine.measured,
        "tiers": {
            str(tier): {
                "name": spec.name,
                "setup_us": spec.setup_us,
                "bandwidth_gb_s": spec.bandwidth_gb_s,
                "capacity_bytes": machine.capacity_bytes.get(tier),
            }
            for tier, spec in machine.tiers.items()
        },
        "compute_weights_per_s": dict(machine.compute),
    }


def machine_from_json(document: Any) -> MachineProfile:
    """Check a document and make a profile of it; raises InputError naming what is wrong."""
    document = _check_object(
        document,
        "a machine",
        required={"format_version", "name", "tiers"},
        optional={"measured", "compute_weights_per_s"},
    )
    if document["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"format_version {document['format_version']!r} is unknown; allowed: {FORMAT_VERSION}"
        )
    measured = document.get("measured", False)
    if not isinstance(measured, bool):
        raise InputError(f"measured {measured!r} must be true or false")
    if not isinstance(document["tiers"], dict):
        raise InputError(f"tiers must be an object, not {document['tiers']!r:.80}")
    tiers, capacities = {}, {}
    for name, entry in document["tiers"].items():
        if name not in list(Tier):
            raise InputError(f"unknown tier {name!r}; allowed: {', '.join(Tier)}")
        entry = _check_object(
            entry,
            f"tier {name}",
            required={"setup_us", "bandwidth_gb_s"},
            optional={"name", "capacity_bytes"},
        )
        tiers[Tier(name)] = TierSpec(
            _check_name(entry.get("name", name)), entry["setup_us"], entry["bandwidth_gb_s"]
        )
        if entry.get("capacity_bytes") is not None:
            try:
                capacities[Tier(name)] = parse_bytes(entry["capacity_bytes"])
            except InputError as error:
                raise InputError(f"tier {name}: capacity_bytes: {error}") from error
    compute = document.get("compute_weights_per_s", {})
    if not isinstance(compute, dict):
        raise InputError(f"compute_weights_per_s must be an object, not {compute!r:.80}")
    return MachineProfile(
        name=_check_name(document["name"]),
        tiers=tiers,
        capacity_bytes=capacities,
        compute=compute,
        measured=measured,
    )


def _check_object(
    value: Any, what: str, *, required: set[str], optional: set[str]
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be an object, not {value!r:.80}")
    if missing := sorted(required - set(value)):
        raise InputError(f"{what} lacks {', '.join(missing)}: add it")
    if unknown := sorted(set(value) - required - optional):
        raise InputError(
            f"{what} has {', '.join(map(repr, unknown))}; allowed: "
            f"{', '.join(sorted(required | optional))}"
        )
    return value


def _check_name(value: Any) -> str:
    if not (isinstance(value, str) and value):
        raise InputError(f"name {value!r} must be text")
    return value
