"""Flags that several commands share: the model, the device, the machine."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..machine import UNMEASURED, MachineProfile
from ..vocabulary import Precision

if TYPE_CHECKING:
    import torch

Flags = argparse._ActionsContainer
"""A parser or a group of it."""


def parse_device(name: str) -> "torch.device":
    """Return the device of ``--device``; ``auto`` is the GPU where there is one."""
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name!r} is unknown: give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    _, _, index = name.partition(":")
    if name != "cpu" and int(index or 0) >= count:
        raise InputError(f"--device {name!r} is not there ({count} CUDA devices): give cpu")
    return torch.device(name)


def planned_device(name: str) -> "torch.device":
    """Return the device to plan for; the machine that plans need not have it."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def planned_precision(name: str | None) -> Precision | None:
    """Return the precision of ``--precision``. Lossless is the most precise of all, to which no
    weights are raised: under an epsilon it says that none are compressed.
    """
    if name is None:
        return None
    return Precision.FP32 if name == "lossless" else Precision(name)


def note_unmeasured(machine: MachineProfile) -> None:
    """Say so where plans were made for this machine, and it was not measured."""
    if machine is UNMEASURED:
        print(
            "note: this machine was not measured, so the times are those of a common one: run "
            "tierhints probe",
            file=sys.stderr,
        )


def add_model_flag(flags: Flags) -> None:
    """Add ``--model`` of a verb that reads weights."""
    flags.add_argument("--model", required=True, help="folder or hub id of a causal LM checkpoint")


def add_hints_flag(flags: Flags, *, required: bool = False) -> None:
    """Add ``--tier-hints``."""
    flags.add_argument(
        "--tier-hints",
        type=Path,
        required=required,
        metavar="FILE",
        help="tier_hints.json of this model: importance and floors of its blocks",
    )


def add_budget_flag(flags: Flags, *, required: bool = False, otherwise: str = "") -> None:
    """Add ``--budget``; ``otherwise``: what is done without one."""
    default = f" (default: {otherwise})" if otherwise else ""
    flags.add_argument(
        "--budget",
        required=required,
        metavar="TIER=SIZE,...",
        help="bytes of each tier: HBM is fast memory (RAM without an accelerator); no size: no "
        f"limit; a tier left out is not used: HBM=700MiB,SSD={default}",
    )


def add_precision_flags(flags: Flags) -> None:
    """Add ``--precision`` and ``--epsilon``."""
    flags.add_argument(
        "--precision",
        choices=["lossless", *map(str, Precision)],
        help="hold all matrices so, though none below its floor (default: lossless, or what "
        "--epsilon allows)",
    )
    flags.add_argument(
        "--epsilon",
        metavar="BOUND",
        help="hold the weights in the fewest bytes within this KL from the full model: 0.02 (nats "
        "per token) or ppl=1.02; needs calibrated --tier-hints (default: no bound)",
    )


def add_device_flag(flags: Flags) -> None:
    """Add ``--device``, for ``parse_device``."""
    flags.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )


def add_planning_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model is planned for, and on which machine."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, required=True, help="folder with a config.json")
    add_hints_flag(model)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--machine",
        type=Path,
        metavar="FILE",
        help="figures of the machine (default: those that `tierhints probe` has measured)",
    )
    machine.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="what computes; need not be here (default: %(default)s)",
    )
