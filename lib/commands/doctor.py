"""Say what this machine has, what of Tierhints works on it, and what to run next.

tierhints doctor
"""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..machine import find_machine, machine_path
from ..units import format_bytes
from .cli import Parser, add_json_flag, emit

Fields = dict[str, Any]
"""A part of the document."""

_PACKAGES = ("tierhints", "transformers", "safetensors", "numpy")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd")
_MATRIX = (1024, 1024)
"""The weight of a Linear that kernels are asked about."""


def main(argv: Sequence[str] | None = None) -> int:
    """Look, print and emit; returns the exit code."""
    parser = Parser("Say what this machine has, and what of Tierhints works on it.")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    from ..tiering.stores import default_spill_folder

    document = examine({"SSD tier": default_spill_folder()})
    measured = document["machine_file"]["state"] == "valid"
    document["next"] = (
        "tierhints plan --model DIR --budget HBM=6GiB,SSD=" if measured else "tierhints probe"
    )
    emit(describe(document, table_rows(document)), document, args.json)
    return 0


def examine(folders: Mapping[str, Path]) -> Fields:
    """Return what is here and what works. ``folders``: where files go, by what they are for; "SSD
    tier" is one of them.
    """
    document: Fields = {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "versions": {name: _version(name) for name in _PACKAGES},
        "extras": probe_extras(),
        "torch": probe_torch(),
        "cpu": probe_cpu(),
        "kernels": probe_kernels(),
        "memory": probe_memory(),
        "disk": probe_disk(folders),
        "numa": probe_numa(),
        "machine_file": probe_machine_file(),
    }
    document["features"] = judge_features(document)
    return document


def probe_extras() -> dict[str, dict[str, bool]]:
    """Return for each extra of the installed package which of its packages are here."""
    extras: dict[str, dict[str, bool]] = {}
    try:
        requirements = importlib.metadata.requires("tierhints") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        requirements = []
    for requirement in requirements:
        found = re.match(r"""([\w.-]+)(?!.*\[).*;.*extra == ["']([\w-]+)["']""", requirement)
        if found and found[1] != "tierhints":
            extras.setdefault(found[2], {})[found[1]] = _version(found[1]) is not None
    return extras


def probe_torch() -> Fields:
    """Return torch's version and build, and the accelerators it sees."""
    import torch

    build = "CPU"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            with torch.cuda.device(index):
                bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            devices.append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "bfloat16": bfloat16,
                }
            )
    return {
        "version": torch.__version__,
        "build": build,
        "devices": devices,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
    }


def probe_cpu() -> Fields:
    """Return the processor, the cores this process may use, and what it computes fast."""
    from ..tiering.stores.limits import read_system_file

    info = read_system_file(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*: (.*)$", info, re.M)
    flags = set(info.split())
    return {
        "name": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cores_in_machine": os.cpu_count(),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "bfloat16": sorted(flags & {"amx_bf16", "avx512_bf16"}),
        "compiler": shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"),
    }


def probe_kernels() -> Fields:
    """Return how products of compressed weights are rounded here, and which kernel computes with
    the weight of a Linear at each precision.
    """
    import torch

    from ..codecs.kernels import Use, choose_kernel, kernel_name
    from ..codecs.layout import PLANE_BITS, default_codec
    from ..codecs.native import load_native

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layouts = {str(p): default_codec(p).layout(*_MATRIX) for p in PLANE_BITS}
    uses = frozenset({Use.LINEAR})
    return {
        "device": kernel_name(device, torch.float32),
        "native": load_native().reason or "built",
        "linear": {name: choose_kernel(each, uses, device).name for name, each in layouts.items()},
    }


def probe_memory() -> Fields:
    """Return RAM in total and available, and the memory limit of the cgroup (None: no limit)."""
    from ..tiering.stores import available_memory, memory_limit, total_memory

    return {
        "total_bytes": total_memory(),
        "available_bytes": available_memory(),
        "cgroup_limit_bytes": memory_limit(),
    }


def probe_disk(folders: Mapping[str, Path]) -> list[Fields]:
    """Return free bytes and the type of file system of each folder, or where it would be made."""
    from ..tiering.stores import filesystem_type

    found = []
    for use, folder in folders.items():
        existing = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
        )
        found.append(
            {
                "use": use,
                "path": str(folder),
                "free_bytes": shutil.disk_usage(existing).free,
                "filesystem": filesystem_type(existing),
            }
        )
    return found


def probe_numa() -> list[Fields]:
    """Return the NUMA nodes; one without CPUs is far memory, such as CXL."""
    from ..tiering.stores.limits import read_system_file

    nodes = []
    for folder in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        total = re.search(r"MemTotal:\s+(\d+) kB", read_system_file(folder / "meminfo"))
        nodes.append(
            {
                "node": int(folder.name.removeprefix("node")),
                "cpus": read_system_file(folder / "cpulist").strip(),
                "memory_bytes": int(total[1]) * 1024 if total else 0,
            }
        )
    return nodes


def probe_machine_file() -> Fields:
    """Return which machine file plans are made by, and the reason if it can't be read."""
    path = machine_path()
    found: Fields = {"path": None if path is None else str(path), "name": None}
    try:
        machine = find_machine()
    except InputError as error:
        return {**found, "state": "invalid", "error": " ".join(str(error).split())}
    if machine is None:
        return {**found, "state": "off" if path is None else "missing", "error": None}
    return {**found, "name": machine.name, "state": "valid", "error": None}


def judge_features(document: Mapping[str, Any]) -> list[Fields]:
    """Say what works here: a list of feature, works, note."""
    from ..tiering.stores import MEMORY_FILESYSTEMS

    torch, cpu = document["torch"], document["cpu"]
    devices = torch["devices"]
    spill = next(disk for disk in document["disk"] if disk["use"] == "SSD tier")
    in_memory = spill["filesystem"] in MEMORY_FILESYSTEMS
    far_nodes = [node["node"] for node in document["numa"] if not node["cpus"]]
    if devices:
        cuda = f"{len(devices)} x {devices[0]['name']}, {format_bytes(devices[0]['memory_bytes'])}"
        bfloat16 = devices[0]["bfloat16"]
    else:
        cuda = "torch is a CPU build" if torch["build"] == "CPU" else "torch sees no device"
        bfloat16 = bool(cpu["bfloat16"])
    return [
        feature("everything on the CPU", True, f"{cpu['cores']} cores"),
        feature("CUDA", bool(devices), cuda),
        feature("fast bfloat16", bfloat16, "" if bfloat16 else "works, slowly"),
        feature("emulated tiers", True, "any tier, on any machine"),
        feature(
            "real offload, CPU tier",
            bool(devices),
            "" if devices else "no accelerator: HBM and CPU tier are both RAM",
        ),
        feature(
            "real offload, SSD tier",
            not in_memory,
            f"{spill['path']} is memory: set TMPDIR, or spill_dir, to a folder on a disk"
            if in_memory
            else f"file in {spill['path']} ({spill['filesystem']})",
        ),
        feature(
            "CXL memory",
            bool(far_nodes),
            f"NUMA nodes without CPUs: {far_nodes}"
            if far_nodes
            else "no NUMA node without CPUs: emulate it (mode='emulated')",
        ),
    ]


def feature(name: str, works: bool, note: str) -> Fields:
    """Return an entry of the list of features."""
    return {"feature": name, "works": works, "note": note}


def table_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table's names and values, in order."""
    python, torch, cpu = document["python"], document["torch"], document["cpu"]
    memory, kernels = document["memory"], document["kernels"]
    limit = memory["cgroup_limit_bytes"]
    versions = [f"{name} {version}" for name, version in document["versions"].items() if version]
    held: dict[str, list[str]] = {}
    for precision, name in kernels["linear"].items():
        held.setdefault(name, []).append(precision)
    linear = "; ".join(f"{name} ({', '.join(of)})" for name, of in held.items())
    threads = f"{torch['num_threads']} threads, {torch['cpu_capability']}"
    return [
        ("Python", f"{python['version']} ({python['executable']})"),
        ("torch", f"{torch['version']}, {torch['build']} build, {threads}"),
        ("packages", ", ".join(versions)),
        *((f"extra {name}", _describe_extra(name, has)) for name, has in _sorted_extras(document)),
        *(
            ("device", f"{device['name']}, {format_bytes(device['memory_bytes'])}")
            for device in torch["devices"]
        ),
        ("CPU", f"{cpu['name']}, {cpu['cores']} of {cpu['cores_in_machine']} cores usable"),
        ("", f"computes with {', '.join(cpu['flags']) or 'nothing special'}"),
        ("kernels", f"{kernels['device']}: {linear}"),
        ("", f"C++ extension: {kernels['native']}"),
        (
            "memory",
            f"{format_bytes(memory['total_bytes'])}, {format_bytes(memory['available_bytes'])} "
            f"available, cgroup limit {format_bytes(limit) if limit else 'none'}",
        ),
        *(
            (
                f"NUMA node {node['node']}",
                f"{format_bytes(node['memory_bytes'])}, CPUs {node['cpus'] or 'none'}",
            )
            for node in document["numa"]
        ),
        *(
            (
                "disk",
                f"{format_bytes(disk['free_bytes'])} free for {disk['use']} in {disk['path']} "
                f"({disk['filesystem']})",
            )
            for disk in document["disk"]
        ),
        ("machine file", describe_machine_file(document["machine_file"])),
    ]


def describe(document: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> str:
    """Return the rows, what works, and what to run next, as text."""
    lines = [f"{name:14} {value}".rstrip() for name, value in rows]
    lines += ["", "Here works:"]
    for entry in document["features"]:
        mark = "yes" if entry["works"] else "no"
        lines.append(f"  {mark:4} {entry['feature']:34} {entry['note']}".rstrip())
    return "\n".join([*lines, "", f"Next: {document['next']}"])


def describe_machine_file(found: Mapping[str, Any]) -> str:
    """Say which machine file plans are made by, or how to get one."""
    if found["state"] == "off":
        return "none, TIERHINTS_MACHINE is empty: plans assume a machine that was not measured"
    if found["state"] == "missing":
        return f"no {found['path']} yet: tierhints probe measures this machine, and writes it"
    return f"{found['path']}: {found['error'] or found['name']}"


def _sorted_extras(document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, bool]]]:
    return sorted(item for item in document["extras"].items() if item[0] != "dev")


def _describe_extra(name: str, packages: Mapping[str, bool]) -> str:
    if all(packages.values()):
        return f"{', '.join(packages)}"
    missing = ", ".join(package for package, here in packages.items() if not here)
    return f"{missing} missing: pip install 'tierhints[{name}]'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
