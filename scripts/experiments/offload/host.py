"""The machine that the benchmark ran on, for its document."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from lib.machine import cpu_name
from scripts.experiments.offload.figures import Fields

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "airllm",
    "diffusers",
    "flextensor",
)


def describe_machine(device: str, threads: int, gpu: Fields | None) -> Fields:
    """Return processor, memory, kernel and versions; ``gpu`` is what a worker said of it."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device": device,
        "gpu": gpu,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }
