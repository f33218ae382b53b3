"""Optimizer states on disk: Adam's second moment of each parameter, without a training run.

``interface`` says what a format has to give and finds the one of a path; each format is in a file
of its own. ``pickles`` is the one place where a pickle is read.
"""

from .dcp import DistributedCheckpoint
from .deepspeed import DeepSpeedShards
from .interface import OptimizerFile, OptimizerKind, SavedMoment, open_optimizer, register_format
from .own import OPTIMIZER_FILE, OwnOptimizerFile
from .torch_file import TorchOptimizerFile
from .universal import UniversalCheckpoint

__all__ = [
    "OPTIMIZER_FILE",
    "DeepSpeedShards",
    "DistributedCheckpoint",
    "OptimizerFile",
    "OptimizerKind",
    "OwnOptimizerFile",
    "SavedMoment",
    "TorchOptimizerFile",
    "UniversalCheckpoint",
    "open_optimizer",
    "register_format",
]
