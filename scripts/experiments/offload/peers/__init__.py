"""The compared systems: ours and its peers, in the order in which they are run on a device."""

from scripts.experiments.offload.peers import (  # isort: skip
    resident,
    ours,
    transformers,
    accelerate,
    airllm,
    diffusers,
    flextensor,
    llama_cpp,
)
from scripts.experiments.offload.peers.base import (
    SYSTEMS,
    Loaded,
    System,
    Task,
    anonymous_bytes,
    register_system,
    systems_on,
)

__all__ = [
    "SYSTEMS",
    "Loaded",
    "System",
    "Task",
    "accelerate",
    "airllm",
    "anonymous_bytes",
    "diffusers",
    "flextensor",
    "llama_cpp",
    "ours",
    "register_system",
    "resident",
    "systems_on",
    "transformers",
]
