"""Decode with everything in memory: our kernels beside Transformers, torchao and llama.cpp.

    python scripts/experiments/decode/bench_decode.py --json docs/results/decode.json
    python scripts/experiments/decode/bench_decode.py --models smollm2 --systems ours llama.cpp \\
        --widths int8 int4 Q8_0 Q4_0 --batches 1 --rounds 3

Each system has a process of its own that keeps its model; they decode in turns, one at a time, with
the same threads, and medians are reported: whatever slows the machine slows all. Quality is each
one's logits on the same tokens against plain fp32. docs/decode.md says what the columns mean.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.errors import InputError
from lib.kconfig import ROOT
from lib.units import GB
from scripts.experiments.decode.peers import SYSTEMS, System
from scripts.experiments.decode.peers.base import COMPILED, EAGER

_SUM_BYTES = 1 << 29
_SUMS = 7
"""How much memory is read at a time, and how often, to see how fast it can be."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    import torch

    from scripts.experiments.decode.figures import table
    from scripts.experiments.decode.models import find_model
    from scripts.experiments.decode.rounds import DECODED_CONTEXT, PREFILL_TOKENS, measure_model
    from scripts.experiments.offload.host import describe_machine

    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    bandwidth = measure_bandwidth()
    measured = {}
    end = time.monotonic() + 60 * args.minutes
    for number, name in enumerate(args.models):
        model = find_model(
            name,
            checkpoint=args.model,
            hints=args.tier_hints,
            demo_folder=ROOT / "runs" / "demo",
            work_dir=args.work_dir,
        )
        share = (end - time.monotonic()) / (len(args.models) - number)
        measured[name] = measure_model(model, chosen_systems(args), args, seconds=share)
        bandwidth = max(bandwidth, measure_bandwidth())
    machine = describe_machine("cpu", args.threads, None)
    machine["capability"] = torch.backends.cpu.get_cpu_capability()
    document = {
        "machine": machine,
        "bandwidth_gb_s": bandwidth,
        "method": {
            "rounds": args.rounds,
            "steps": args.steps,
            "context": DECODED_CONTEXT,
            "prefill": PREFILL_TOKENS,
            "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        },
        "models": {name: each.to_json(bandwidth) for name, each in measured.items()},
    }
    emit(table(document), document, args.json)
    return 0


def measure_bandwidth() -> float:
    """Return the GB/s at which all threads read memory: an fp32 array summed, the best of some."""
    import torch

    values = torch.ones(_SUM_BYTES // 4)
    seconds = []
    for _ in range(_SUMS):
        begin = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - begin)
    return _SUM_BYTES / GB / min(seconds)


def chosen_systems(args: argparse.Namespace) -> Iterator[tuple[System, str]]:
    """Yield what is compared: systems with their widths, the plain model first in any case."""
    for place, system in enumerate(SYSTEMS.values()):
        for index, width in enumerate(system.widths):
            chosen = (args.systems is None or system.name in args.systems) and (
                args.widths is None or width in args.widths
            )
            if chosen or place == index == 0:
                yield system, width


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line; raises InputError for what can't be run."""
    from scripts.experiments.decode.models import MODELS

    args = _parser(MODELS).parse_args(argv)
    widths = [width for system in SYSTEMS.values() for width in system.widths]
    _check_names("--models", args.models, MODELS)
    _check_names("--systems", args.systems or (), list(SYSTEMS))
    _check_names("--widths", args.widths or (), widths)
    _check_names("--modes", args.modes, (EAGER, COMPILED))
    numbers = [("--rounds", args.rounds), ("--steps", args.steps), ("--threads", args.threads)]
    numbers += [("--sequences", args.sequences), ("--minutes", args.minutes)]
    for flag, number in [*numbers, *(("--batches", batch) for batch in args.batches)]:
        if number < 1:
            raise InputError(f"{flag} {number} is too small: give 1 or more")
    if args.model is not None and not (args.model / "config.json").exists():
        raise InputError(f"--model {args.model} has no config.json: give a checkpoint's folder")
    return args


def _check_names(flag: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    known = list(dict.fromkeys(allowed))
    for name in names:
        if name not in known:
            raise InputError(f"{flag} {name!r} is unknown; allowed: {', '.join(known)}")


def _parser(models: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(str(__doc__).split("\n")[0])
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--models", nargs="+", default=list(models), metavar="NAME", help="(default: all)"
    )
    what.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="checkpoint to take for smollm2 (default: the demo's, downloaded the first time)",
    )
    what.add_argument(
        "--tier-hints",
        type=Path,
        metavar="FILE",
        help="its calibrated hints, for the epsilons (default: the demo's, with the demo's model)",
    )
    what.add_argument("--systems", nargs="+", metavar="NAME", help=f"of {', '.join(SYSTEMS)}")
    what.add_argument(
        "--widths", nargs="+", metavar="WIDTH", help="such as int4 epsilon-0.02 Q4_K_M bf16"
    )
    what.add_argument(
        "--modes",
        nargs="+",
        default=[EAGER, COMPILED],
        metavar="MODE",
        help="of what torch computes (default: eager compiled)",
    )
    what.add_argument(
        "--batches",
        nargs="+",
        type=int,
        default=[1, 4, 16],
        metavar="N",
        help="sequences that are decoded at once (default: 1 4 16)",
    )
    what.add_argument(
        "--sequences",
        type=int,
        default=8,
        metavar="N",
        help="of 512 tokens, for KL and perplexity (default: %(default)s)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    how.add_argument(
        "--steps", type=int, default=8, help="timed steps of a turn (default: %(default)s)"
    )
    how.add_argument(
        "--minutes",
        type=int,
        default=240,
        help="nothing is begun after them; each model has an equal share (default: %(default)s)",
    )
    how.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of everybody (default: %(default)s)"
    )
    how.add_argument(
        "--llama-python",
        metavar="PATH",
        help="interpreter that has llama-cpp-python (default: this one)",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--work-dir",
        type=Path,
        default=ROOT / "runs" / "decode",
        metavar="DIR",
        help="for the random checkpoint, GGUF files and logs, some GB (default: runs/decode)",
    )
    add_json_flag(files)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
