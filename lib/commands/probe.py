"""Measure what each tier of this machine takes to read from, and how fast it computes with weights
of each precision; write machine.json, by which plans are made from then on.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..machine import (
    MACHINE_VARIABLE,
    MachineProfile,
    cpu_name,
    machine_path,
    machine_to_json,
    save_machine,
)
from ..progress import show_progress
from ..tiering.probe.compute import measure_compute
from ..tiering.probe.lanes import Lane, open_lanes
from ..tiering.probe.links import UNIT_SIZES, Point, make_profile, time_lanes
from ..tiering.stores import (
    available_memory,
    default_spill_folder,
    filesystem_type,
    memory_limit,
    total_memory,
)
from ..units import GB, GIB, MIB, format_bytes, format_seconds, parse_bytes
from .cli import Parser, add_json_flag, check_outputs, emit, output_file
from .flags import whole_number

_QUICK_BYTES = 128 * MIB
_QUICK_LARGEST = 16 * MIB


def main(argv: Sequence[str] | None = None) -> int:
    """Probe, print and write the profile; returns the exit code."""
    args = _parser().parse_args(argv)
    output = args.output or machine_path()
    if output is None:
        raise InputError(
            f"{MACHINE_VARIABLE} is empty, so no machine file is read: unset it, or give --output"
        )
    check_outputs({"--output": output, "--json": args.json})
    sizes = [size for size in UNIT_SIZES if not args.quick or size <= _QUICK_LARGEST]
    file_bytes = _choose_file_bytes(args.size, args.quick, max(sizes))
    repeats = args.repeats or (3 if args.quick else 15)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = args.spill_dir or default_spill_folder()
    lanes = open_lanes(
        device,
        spill_dir=folder,
        file_bytes=file_bytes,
        largest=max(sizes),
        numa_node=args.numa_node,
    )
    try:
        rounds = show_progress(range(repeats), "probing", total=repeats, unit="round")
        points = time_lanes(lanes, sizes, rounds)
    finally:
        for lane in lanes:
            lane.close()
    compute = measure_compute(device, rounds=repeats)
    machine = make_profile(args.name or machine_name(device), lanes, points, compute)
    save_machine(machine, output)
    used = "used by every plan from now on" if output == machine_path() else "give it as --machine"
    emit(
        f"{probe_table(machine, lanes, points)}\n\nWritten: {output} ({used})",
        {
            "machine": machine_to_json(machine),
            "points": {str(tier): [asdict(p) for p in found] for tier, found in points.items()},
            "memory": {
                "total_bytes": total_memory(),
                "available_bytes": available_memory(),
                "cgroup_limit_bytes": memory_limit(),
            },
            "disk": {
                "folder": str(folder),
                "filesystem": filesystem_type(folder),
                "file_bytes": file_bytes,
            },
            "device": str(device),
            "warm_up_rounds": 1,
            "quick": args.quick,
        },
        args.json,
    )
    return 0


def machine_name(device: torch.device) -> str:
    """Name a machine by its processor and its GPU."""
    if device.type != "cuda":
        return cpu_name()
    return f"{cpu_name()}, {torch.cuda.get_device_name(device)}"


def probe_table(
    machine: MachineProfile, lanes: Iterable[Lane], points: dict[Any, list[Point]]
) -> str:
    """Return what was measured of each tier, per size of unit."""
    lines = [
        f"{'tier':5} {'what':22} {'capacity':>11} {'setup':>9} {'GB/s':>7}   measured, per unit"
    ]
    for lane in lanes:
        spec, capacity = machine.tiers[lane.tier], machine.capacity_bytes.get(lane.tier)
        lines.append(
            f"{lane.tier:5} {lane.name:22} {format_bytes(capacity) if capacity else 'unknown':>11} "
            f"{format_seconds(spec.setup_us * 1e-6):>9} {spec.bandwidth_gb_s:7.2f}"
        )
        for point in points[lane.tier]:
            fitted = spec.transfer_seconds(point.num_bytes)
            lines.append(
                f"{'':5} {format_bytes(point.num_bytes):>22} {format_seconds(point.median_s):>11} "
                f"median {format_seconds(point.p95_s):>9} p95, n={point.n}, "
                f"{point.num_bytes / point.median_s / GB:.2f} GB/s, "
                f"fit {fitted / point.median_s - 1:+.0%}"
            )
    lines += ["", f"{'compute, products with one row':39} Gweights/s"]
    lines += [f"{'':5} {p:33} {rate / 1e9:10.2f}" for p, rate in machine.compute.items()]
    return "\n".join(lines)


def _choose_file_bytes(size: str | None, quick: bool, largest: int) -> int:
    if size is None:
        return _QUICK_BYTES if quick else GIB
    file_bytes = parse_bytes(size) // largest * largest
    if file_bytes < 2 * largest:
        raise InputError(
            f"--size {size} is too small for units of {format_bytes(largest)}: give "
            f"{format_bytes(2 * largest)} or more"
        )
    return file_bytes


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="machine file to write (default: where every plan looks for it, $TIERHINTS_MACHINE or "
        "tierhints/machine.json in the user's cache folder)",
    )
    parser.add_argument(
        "--spill-dir",
        type=Path,
        metavar="FOLDER",
        help="folder on the disk to measure (default: TMPDIR, or /var/tmp)",
    )
    parser.add_argument(
        "--size",
        metavar="SIZE",
        help="size of the file that is read, such as 2GiB (default: 1GiB, or 128MiB with --quick)",
    )
    parser.add_argument(
        "--repeats",
        type=whole_number(1),
        metavar="N",
        help="rounds that are timed (default: 15, or 3 with --quick)",
    )
    parser.add_argument(
        "--numa-node",
        type=whole_number(0),
        metavar="N",
        help="NUMA node to measure as the CXL tier (default: the first one without CPUs, if any)",
    )
    parser.add_argument("--name", help="name of the machine (default: its processor and GPU)")
    parser.add_argument(
        "--quick", action="store_true", help="a rough measurement in a few seconds, for tests"
    )
    add_json_flag(parser)
    return parser
