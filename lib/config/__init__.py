"""The configuration: Kconfig evaluates ``.config``, and frozen dataclass groups carry it on.

Ranges and defaults live in the Kconfig files, beside what they configure, and are not repeated
here. Here are the Python types, the numbers that Kconfig holds as strings, and the checks over more
than one symbol. Nothing else reads ``.config``.
"""

from .build import build_config, load_config
from .groups import (
    Config,
    DataConfig,
    Device,
    Mode,
    ModelConfig,
    MoeConfig,
    Parallel,
    PruneConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "Device",
    "Mode",
    "ModelConfig",
    "MoeConfig",
    "Parallel",
    "PruneConfig",
    "TrainConfig",
    "build_config",
    "load_config",
]
