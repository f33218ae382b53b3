"""Bytes and seconds, as people write them. Memory is binary (MiB), bandwidth decimal (GB/s)."""

import re
from fractions import Fraction
from numbers import Real
from typing import Any

from .errors import InputError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
GB = 10**9
SECTOR_BYTES = 4096
"""What is read past the page cache, and what slots are made of: whole multiples of this."""
"""One gigabyte of link bandwidth (GB/s), decimal as in every data sheet."""

_SIZE_UNITS = {
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": GB,
    "tb": 10**12,
}
_MAX_SIZE = 2**63


def rows_within(size: int, row_size: int) -> int:
    """Return how many rows to take at a time, of ``size`` at most: at least one, and of many a
    multiple of 64, as what is cut by rows is.
    """
    rows = max(size // row_size, 1)
    return rows - rows % 64 if rows > 64 else rows


def parse_bytes(size: Any) -> int:
    """Return the bytes of a size: "700MiB", "1.5 GiB", "6GB" (decimal), "4096", or a whole number.

    Rounded down. Raises InputError for anything else.
    """
    num_bytes = None
    if isinstance(size, int) and not isinstance(size, bool):
        num_bytes = size
    elif isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", size, re.ASCII)
        factor = match and _SIZE_UNITS.get(match[2].lower() or "b")
        if match and factor:
            num_bytes = int(Fraction(match[1]) * factor)
    if num_bytes is None or not 0 <= num_bytes < _MAX_SIZE:
        raise InputError(
            f"size {size!r} is not a size from 0 to 8 EiB: give a number of bytes, or one with a "
            "unit, such as 700MiB, 1.5GiB (KiB, MiB, GiB, TiB: powers of 1024) or 6GB (kB, MB, GB, "
            "TB: powers of 1000)"
        )
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Print a size in the largest binary unit that leaves at least one whole digit."""
    for factor, suffix in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.1f} {suffix}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Print a duration in s, ms, us or ns with three significant digits."""
    for factor, suffix in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= factor:
            return f"{seconds / factor:.3g} {suffix}"
    return f"{seconds / 1e-9:.3g} ns"


def parse_number(value: str | float, *, name: str, interval: str, example: str) -> float:
    """Parse a plain decimal number in ``[0, 1]``, or in ``(0, 1)`` without the ends.

    Raises InputError that calls the number ``name``.
    """
    fix = f"give a number in {interval}, for example {example}"
    # float() would take "nan", "inf", "1_0" and spaces as well.
    plain = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, str):
        plain = bool(re.fullmatch(r"-?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?", value))
    if not plain:
        raise InputError(f"{name} {value!r} is not a plain decimal number: {fix}")
    number = float(value)
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval.startswith("[") else number > low
    below = number <= high if interval.endswith("]") else number < high
    if not (above and below):  # also NaN
        raise InputError(f"{name} {value!r} is out of range: {fix}")
    return number


def parse_thresholds(
    hbm: str | float,
    cpu: str | float,
    *,
    names: tuple[str, str] = ("HBM threshold", "CPU threshold"),
) -> tuple[float, float]:
    """Parse the cumulative fractions of weight bytes at which the HBM and the CPU tier end.

    ``names`` are what the errors call them; raises InputError.
    """
    hbm_end = parse_number(hbm, name=names[0], interval="[0, 1]", example="0.3")
    cpu_end = parse_number(cpu, name=names[1], interval="[0, 1]", example="0.8")
    if hbm_end > cpu_end:
        raise InputError(
            f"{names[0]} {hbm} is above {names[1]} {cpu}: both are cumulative fractions in [0, 1] "
            f"and HBM comes first, so lower the first or raise the second (0.3 and 0.8 give 30 % "
            f"HBM, 50 % CPU, 20 % SSD)"
        )
    return hbm_end, cpu_end
