"""Say what this machine has, what of Tierhints works on it, and what to run next."""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.commands.cli import emit_json, run_main
from lib.config import load_config
from lib.errors import InputError
from lib.files import check_writable
from lib.kconfig import ROOT
from lib.machine import find_machine, machine_path
from lib.tiering.stores import MEMORY_FILESYSTEMS, default_spill_folder, filesystem_type
from lib.units import format_bytes


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    document: dict[str, Any] = {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": probe_packages(),
        "torch": probe_torch(),
        "cpu": probe_cpu(),
        "memory": probe_memory(),
        "disk": probe_disk(args.config),
        "numa": probe_numa(),
        "machine_file": probe_machine_file(),
        "configuration": probe_configuration(args.config),
    }
    document["features"] = judge_features(document)
    document["next"] = next_command(document)
    print_table(document)
    emit_json(document, args.json)
    return 0


def probe_packages() -> dict[str, Any]:
    """Return how many packages constraints.txt pins, and which of them are missing or differ."""
    pins = re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    different = []
    for name, pinned in pins:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        # A local version (+cpu, +cu130) is a build of the same release.
        if installed is None or installed.partition("+")[0] != pinned:
            different.append({"name": name, "pinned": pinned, "installed": installed})
    return {"num_pinned": len(pins), "different": different}


def probe_torch() -> dict[str, Any]:
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
    return {"version": torch.__version__, "build": build, "devices": devices}


def probe_cpu() -> dict[str, Any]:
    """Return the processor, the cores this process may use, and what matters for bfloat16."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info, re.M)
    flags = set(info.split())
    return {
        "name": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cores_in_machine": os.cpu_count(),
        "bfloat16": sorted(flags & {"amx_bf16", "avx512_bf16"}),
        "compiler": shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"),
    }


def probe_memory() -> dict[str, Any]:
    """Return RAM in total and available, and the memory limit of the cgroup (None: no limit)."""
    sizes = {
        name: int(kib) * 1024
        for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M)
    }
    total = sizes.get("MemTotal", 0)
    limits = [limit for limit in _cgroup_limits() if limit < total]
    return {
        "total_bytes": total,
        "available_bytes": sizes.get("MemAvailable", 0),
        "cgroup_limit_bytes": min(limits, default=None),
    }


def _cgroup_limits() -> list[int]:
    """Return the memory limits of this process's cgroup and those above it, version 1 and 2."""
    limits = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, file = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            mount, file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, and its limit at the mount itself.
        for folder in {group, *group.parents, mount}:
            text = _read(folder / file).strip()
            if text.isdigit():
                limits.append(int(text))
    return limits


def probe_disk(config: Path) -> list[dict[str, Any]]:
    """Return where runs and the SSD tier lie: free bytes, and the type of file system."""
    folders = {"runs": Path("runs"), "SSD tier": default_spill_folder()}
    try:
        configuration = load_config(config)
        folders["runs"] = Path(configuration.run.output_dir)
        if configuration.tiering.spill_dir:
            folders["SSD tier"] = Path(configuration.tiering.spill_dir)
    except InputError:
        pass  # probe_configuration reports it
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


def probe_numa() -> list[dict[str, Any]]:
    """Return the NUMA nodes; one without CPUs is far memory, such as CXL."""
    nodes = []
    for folder in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        total = re.search(r"MemTotal:\s+(\d+) kB", _read(folder / "meminfo"))
        nodes.append(
            {
                "node": int(folder.name.removeprefix("node")),
                "cpus": _read(folder / "cpulist").strip(),
                "memory_bytes": int(total[1]) * 1024 if total else 0,
            }
        )
    return nodes


def probe_machine_file() -> dict[str, Any]:
    """Return which machine file plans are made by, and the reason if it can't be read."""
    path = machine_path()
    found: dict[str, Any] = {"path": None if path is None else str(path), "name": None}
    try:
        machine = find_machine()
    except InputError as error:
        return {**found, "state": "invalid", "error": " ".join(str(error).split())}
    if machine is None:
        return {**found, "state": "off" if path is None else "missing", "error": None}
    return {**found, "name": machine.name, "state": "valid", "error": None}


def probe_configuration(path: Path) -> dict[str, Any]:
    """Return whether the configuration loads, and the reason if it doesn't."""
    if not path.exists():
        return {"path": str(path), "state": "missing", "error": None}
    try:
        load_config(path)
    except InputError as error:
        return {"path": str(path), "state": "invalid", "error": " ".join(str(error).split())}
    return {"path": str(path), "state": "valid", "error": None}


def judge_features(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Say what works here: a list of feature, works, note."""
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
        _feature("training and benchmark on the CPU", True, f"{cpu['cores']} cores"),
        _feature("CUDA", bool(devices), cuda),
        _feature("several GPUs (torchrun, FSDP2)", len(devices) > 1, f"{len(devices)} devices"),
        _feature("fast bfloat16", bfloat16, "" if bfloat16 else "works, slowly"),
        _feature("torch.compile", bool(cpu["compiler"]), cpu["compiler"] or "no C++ compiler"),
        _feature("emulated tiers", True, "any tier, on any machine"),
        _feature(
            "real offload, CPU tier",
            bool(devices),
            "" if devices else "no accelerator: HBM and CPU tier are both RAM",
        ),
        _feature(
            "real offload, SSD tier",
            not in_memory,
            f"{spill['path']} is memory: set TIERING_SPILL_DIR to a folder on a disk"
            if in_memory
            else f"file in {spill['path']} ({spill['filesystem']})",
        ),
        _feature(
            "CXL memory",
            bool(far_nodes),
            f"NUMA nodes without CPUs: {far_nodes}"
            if far_nodes
            else "no NUMA node without CPUs: emulate it (tier-emulated-cxl)",
        ),
    ]


def _feature(name: str, works: bool, note: str) -> dict[str, Any]:
    return {"feature": name, "works": works, "note": note}


def next_command(document: dict[str, Any]) -> str:
    """Return what to run next."""
    state = document["configuration"]["state"]
    return {"missing": "make quickstart", "invalid": "make menuconfig", "valid": "make"}[state]


def print_table(document: dict[str, Any]) -> None:
    python, torch, cpu = document["python"], document["torch"], document["cpu"]
    memory, configuration = document["memory"], document["configuration"]
    limit = memory["cgroup_limit_bytes"]
    rows = [
        ("Python", f"{python['version']} ({python['executable']})"),
        ("torch", f"{torch['version']}, {torch['build']} build"),
        *(
            ("device", f"{device['name']}, {format_bytes(device['memory_bytes'])}")
            for device in torch["devices"]
        ),
        ("CPU", f"{cpu['name']}, {cpu['cores']} of {cpu['cores_in_machine']} cores usable"),
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
        ("packages", describe_packages(document["packages"])),
        (
            "configuration",
            f"{configuration['path']}: {configuration['error'] or configuration['state']}",
        ),
    ]
    for name, value in rows:
        print(f"{name:14} {value}")
    print("\nHere works:")
    for feature in document["features"]:
        mark = "yes" if feature["works"] else "no"
        print(f"  {mark:4} {feature['feature']:34} {feature['note']}".rstrip())
    print(f"\nNext: {document['next']}\n")


def describe_machine_file(found: dict[str, Any]) -> str:
    if found["state"] == "off":
        return "none, TIERHINTS_MACHINE is empty: plans assume a machine that was not measured"
    if found["state"] == "missing":
        return f"no {found['path']} yet: make probe measures this machine, and writes it"
    return f"{found['path']}: {found['error'] or found['name']}"


def describe_packages(packages: dict[str, Any]) -> str:
    different = [
        f"{package['name']} {package['installed'] or 'missing'} (pinned {package['pinned']})"
        for package in packages["different"]
    ]
    if different:
        return f"not as constraints.txt pins them: {', '.join(different)}"
    return f"{packages['num_pinned']}, all as constraints.txt pins them"


def _read(path: str | Path) -> str:
    """Return a file's text, "" where it is not there: what Linux tells differs by machine."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(".config"),
        metavar="FILE",
        help="configuration to check (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here too"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
