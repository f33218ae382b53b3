"""Flags that several commands share: the model, the device, the machine."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..machine import UNMEASURED, MachineProfile
from ..units import parse_bytes
from ..vocabulary import Precision

if TYPE_CHECKING:
    import torch

Flags = argparse._ActionsContainer
"""A parser or a group of it."""
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the ``type`` of a flag that takes whole numbers from ``least`` to ``most``."""
    allowed = f"{least} or more" if most is None else f"{least} to {most}"

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,40}", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number: give {allowed}")
        number = int(text)
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {allowed}")
        return number

    return parse


def flag_name(setting: str) -> str:
    """Return the flag of a setting: what errors are to call ``top_p`` on a command line."""
    return f"--{setting.replace('_', '-')}"


def add_seed_flag(flags: Flags, *, of: str) -> None:
    """Add ``--seed``; ``of``: what it is the seed of."""
    flags.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=0,
        metavar="N",
        help=f"of {of} (default: %(default)s)",
    )


def parse_device(name: str) -> "torch.device":
    """Return the device of ``--device``; ``auto`` is the GPU where there is one."""
    import torch

    _check_device_name(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    _, _, index = name.partition(":")
    if name != "cpu" and int(index or 0) >= count:
        raise InputError(f"--device {name!r} is not there ({count} CUDA devices): give cpu")
    return torch.device(name)


def _check_device_name(name: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name!r} is unknown: give auto, cpu, cuda or cuda:N")


def planned_device(name: str) -> "torch.device":
    """Return the device to plan for; the machine that plans need not have it."""
    import torch

    _check_device_name(name)
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


def read_budgets(text: str, total: int) -> list[tuple[str, int]]:
    """Read ``25%,700MiB``: shares of ``total`` or sizes, with their bytes, each more than 0; raises
    InputError.
    """
    budgets = []
    for entry in map(str.strip, text.split(",")):
        share = _PERCENT.fullmatch(entry)
        size = int(total * float(share[1]) / 100) if share else parse_bytes(entry)
        if not size:
            raise InputError(
                f"--budgets {entry!r} is no memory at all: give more than 0, such as 25% or 700MiB"
            )
        budgets.append((entry, size))
    return sorted(dict(budgets).items(), key=lambda budget: budget[1])


def check_epsilon(args: argparse.Namespace) -> None:
    """Raise InputError for an ``--epsilon`` that is no bound, or has no hints to predict by."""
    from ..precision.floors import parse_epsilon

    if args.epsilon is None:
        return
    parse_epsilon(args.epsilon, name="--epsilon")
    if args.tier_hints is None:
        raise InputError(
            "--epsilon needs --tier-hints, which predict what precision costs: give those that "
            "tierhints calibrate wrote"
        )


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
        default="auto",
        help="what computes, and need not be here: auto, cpu, cuda or cuda:N (default: auto)",
    )
