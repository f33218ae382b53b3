"""The compared systems: transformers first, with which the others are compared, ours and peers."""

from scripts.experiments.decode.peers import (  # isort: skip
    transformers,
    ours,
    torchao,
    llama_cpp,
)
from scripts.experiments.decode.peers.base import (
    SYSTEMS,
    Session,
    Sizes,
    System,
    Task,
    register_system,
)

__all__ = [
    "SYSTEMS",
    "Session",
    "Sizes",
    "System",
    "Task",
    "llama_cpp",
    "ours",
    "register_system",
    "torchao",
    "transformers",
]
