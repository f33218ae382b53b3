"""Bytes and seconds: as people read them. Memory is binary (MiB), bandwidth decimal (GB/s)."""

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
GB = 10**9
"""One gigabyte of link bandwidth (GB/s), decimal as in every data sheet."""


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
