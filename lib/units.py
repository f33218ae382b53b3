"""Bytes and seconds: parse and print. Memory is binary (MiB), bandwidth decimal (GB/s)."""

import re

from .errors import InputError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
GB = 10**9
"""One gigabyte of link bandwidth (GB/s), decimal as in every data sheet."""

_SUFFIXES = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Parse a size such as ``700MiB``, ``1.5 GiB`` or ``4096``; raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _SUFFIXES.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise InputError(
            f"size {text!r}: write a number and a unit (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB)"
        )
    return int(float(match[1]) * factor)


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
