"""The command line of bench_offload.py: its flags, what they may be, what follows from them."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError
from lib.machine import load_machine
from lib.units import GIB, MIB
from scripts.experiments.offload.settings import (
    CPU_SETTING,
    CUDA_SETTING,
    SETTINGS,
    Setting,
    choose_setting,
)

_DEFAULT_RUN = Path("runs/quickstart")
_TRAINED_LIMIT_MIB, _TRAINED_BUDGET_MIB = 800, 230
"""Of SmolLM2's 513 MiB the budget is 45 %; torch, its compiler and activations take the rest."""
_MAX_TOKENS = 200
"""With the prompt and the untimed tokens they must fit the toy model's context of 256."""


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setting]:
    """Read a command line, with every default filled in; raises InputError for what can't be run.

    Nothing is written, and nothing heavy imported, before the numbers are known to be good.
    """
    args = _parser().parse_args(argv)
    _check_numbers(args)
    setting = choose_setting(args.device)
    _check_fit(args, setting)
    toy = setting.toy.num_bytes() / MIB
    args.tokens = args.tokens or (4 if args.quick else None)
    if args.quick and args.ours_budget_mib is None:
        args.ours_budget_mib = toy / 2
    if args.gpu_budget_gib:
        args.limits = [round(size * GIB / MIB) for size in args.gpu_budget_gib]
    if args.trained:
        args.limits = args.limits or [_TRAINED_LIMIT_MIB]
        if args.ours_budget_mib is None:
            args.ours_budget_mib = _TRAINED_BUDGET_MIB
    args.limits = args.limits or (setting.toy_limits_mib if args.quick else setting.limits_mib)
    if args.reserve_mib is None:
        args.reserve_mib = setting.reserve_mib
    default_run = not args.quick and not args.trained and setting is CPU_SETTING
    if args.quality is None and default_run and (_DEFAULT_RUN / "checkpoint").is_dir():
        args.quality = _DEFAULT_RUN
    if args.quality is not None and not (args.quality / "checkpoint" / "config.json").exists():
        raise InputError(f"--quality {args.quality} has no checkpoint: give the folder of a run")
    if args.work_dir is None:
        from lib.tiering.stores import default_spill_folder

        args.work_dir = default_spill_folder() / "tierhints-bench"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    return args, setting


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that can't be meant, each with its range and what to give."""
    for flag, value, least, most, fix in (
        ("--rounds", args.rounds, 1, None, "1 runs everything once"),
        ("--threads", args.threads, 1, None, "leave it out for all cores"),
        ("--tokens", args.tokens, 2, _MAX_TOKENS, "leave it out for each system's own number"),
        ("--reserve-mib", args.reserve_mib, 0, None, "leave it out for the device's default"),
    ):
        if value is not None and not least <= value <= (most or math.inf):
            bounds = f"{least} or more" if most is None else f"{least} to {most}"
            raise InputError(f"{flag} {value} is out of range: allowed are {bounds}; {fix}")
    sizes = [("--ours-budget-mib", args.ours_budget_mib, "leave it out for what the limit leaves")]
    sizes += [("--limits", limit, "such as 900") for limit in args.limits or ()]
    sizes += [("--gpu-budget-gib", size, "such as 6") for size in args.gpu_budget_gib or ()]
    for flag, size, fix in sizes:
        if size is not None and not (size > 0 and math.isfinite(size)):
            raise InputError(f"{flag} {size} is out of range: allowed is any size above 0; {fix}")


def _check_fit(args: argparse.Namespace, setting: Setting) -> None:
    """Refuse what the chosen device has no use for, or doesn't know."""
    if args.limits and setting is CUDA_SETTING:
        raise InputError(
            "--limits are of host memory and have no effect on a GPU: give --gpu-budget-gib, or "
            "--device cpu"
        )
    if args.trained and (setting is CUDA_SETTING or args.quick):
        raise InputError("--trained has no effect with --quick or on a GPU: leave one out")
    if args.gpu_budget_gib and setting is CPU_SETTING:
        raise InputError(
            "--gpu-budget-gib has no effect without a GPU: give --limits, or --device cuda"
        )
    names = [system.name for system in setting.systems]
    for name in args.only or ():
        if name not in names:
            raise InputError(
                f"--only {name!r} is unknown on {setting.device}; allowed: {', '.join(names)}"
            )
    if args.machine is not None:
        load_machine(args.machine)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_offload.py",
        description="Benchmark our offload runtime and its peers under the same memory limits.",
        epilog="Exit codes: 0 done, 1 a run of ours failed or was not exact, 2 wrong input. The "
        "last line of stdout is JSON.",
    )
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--device",
        choices=("auto", *SETTINGS),
        default="auto",
        help="cpu: a GPT-2 under limits of host memory, weights on disk; cuda: a 7B Llama under "
        "limits of GPU memory, weights in host memory (default: %(default)s, a GPU where there is "
        "one)",
    )
    what.add_argument(
        "--limits",
        nargs="+",
        type=int,
        metavar="MIB",
        help="limits of host memory, on cpu (default: "
        f"{' '.join(map(str, CPU_SETTING.limits_mib))})",
    )
    what.add_argument(
        "--gpu-budget-gib",
        nargs="+",
        type=float,
        metavar="GIB",
        help="limits of GPU memory, on cuda; the ratios are of the first (default: "
        f"{CUDA_SETTING.limits_mib[0] * MIB // GIB})",
    )
    what.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="these systems, and the resident one; "
        + "; ".join(
            f"{setting.device}: {', '.join(system.name for system in setting.systems[1:])}"
            for setting in SETTINGS.values()
        ),
    )
    what.add_argument(
        "--rounds", type=int, default=1, help="interleaved repetitions (default: %(default)s)"
    )
    what.add_argument(
        "--quick", action="store_true", help="a toy model and few tokens, to see that it works"
    )
    what.add_argument(
        "--trained",
        action="store_true",
        help="SmolLM2-135M-Instruct in fp32 in the place of random weights, on cpu, with what "
        f"drafts (default limit: {_TRAINED_LIMIT_MIB}, of which ours has {_TRAINED_BUDGET_MIB})",
    )
    what.add_argument(
        "--quality",
        type=Path,
        metavar="RUN_FOLDER",
        help="trained model to measure perplexity and KL of int8 and int4 on, on the CPU (default: "
        f"{_DEFAULT_RUN} where it is there; not with --quick or on cuda)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"timed tokens of each run, 2 to {_MAX_TOKENS} (default: each system's own, 3 to 24: "
        "fewer of the slow ones)",
    )
    how.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="compute threads (default: %(default)s)"
    )
    how.add_argument(
        "--reserve-mib",
        type=int,
        metavar="MIB",
        help="of the limit, what our weights leave to activations, the KV cache and the allocator "
        f"(default: {CPU_SETTING.reserve_mib}, on cuda {CUDA_SETTING.reserve_mib})",
    )
    how.add_argument(
        "--ours-budget-mib",
        type=float,
        metavar="MIB",
        help="budget of our weights (default: the limit, less the process's own on cpu, less the "
        "reserve)",
    )
    how.add_argument(
        "--machine",
        type=Path,
        metavar="FILE",
        help="machine.json that ours plans with (default: that of `tierhints probe`)",
    )
    output = parser.add_argument_group("files")
    output.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="for checkpoint and offloaded weights, on the disk to measure (default: below TMPDIR "
        "or /var/tmp)",
    )
    output.add_argument("--plot", type=Path, metavar="FILE", help="PNG of tokens/s and memory")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the document here too")
    return parser
