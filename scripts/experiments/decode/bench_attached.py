"""What attaching costs: eager steps of the untouched model and of attached ones, in one process.

    python scripts/experiments/decode/bench_attached.py
    python scripts/experiments/decode/bench_attached.py --models llama_30x64 --widths int4

Processes of the same model differ by a tenth among themselves; here all models are in one, each in
memory of its own, with everything resident. They decode in turns after the same context, round
after round, every other round in the reverse order. The ratio is the median, over rounds, of a
turn's median step over that of the untouched model in the same round: 1 costs nothing.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import numpy as np

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.errors import InputError
from lib.kconfig import ROOT
from lib.progress import progress_bar
from scripts.experiments.decode.models import BenchModel, add_model_flags
from scripts.experiments.decode.peers import SYSTEMS, Session, Task
from scripts.experiments.decode.peers.base import EAGER, WARM_UP_STEPS
from scripts.experiments.decode.peers.ours import LOSSLESS

_PLAIN = "plain"
_CONTEXT = 64
_RESAMPLES = 2000
"""Of rounds, for the interval of a median."""
_HEADS = "model        width       ms    p95    n  times plain  95 % of resamples"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if min(args.rounds, args.steps, args.threads) < 1:
        raise InputError("--rounds, --steps and --threads: at least 1")
    import torch

    from scripts.experiments.decode.models import find_model
    from scripts.experiments.offload.host import describe_machine

    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        model = find_model(
            name,
            checkpoint=args.model,
            hints=None,
            demo_folder=ROOT / "runs" / "demo",
            work_dir=args.work_dir,
        )
        label = args.model.name if args.model and model.trained else name
        rows += [{"model": label, **row} for row in _measure(model, args)]
    document = {
        "machine": describe_machine("cpu", args.threads, None),
        "rounds": args.rounds,
        "steps": args.steps,
        "context": _CONTEXT,
        "rows": rows,
    }
    lines = [_HEADS]
    lines += [
        f"{row['model']:<11}  {row['width']:<8}  {row['ms_per_token']:5.2f}"
        f"  {row['p95_ms_per_token']:5.2f}  {row['n']:3}  {row['ratio']:11.3f}"
        f"  {row['ratio_interval'][0]:.3f} to {row['ratio_interval'][1]:.3f}"
        for row in rows
    ]
    emit("\n".join(lines), document, args.json)
    return 0


def _measure(model: BenchModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of the document for the untouched model, and one for each width."""
    ids_1T = np.random.default_rng(0).integers(model.vocab_size, size=(1, _CONTEXT))
    steps = args.steps + WARM_UP_STEPS
    sessions: dict[str, Session] = {}
    for width in (_PLAIN, *args.widths):
        system, held = ("transformers", "fp32") if width == _PLAIN else ("ours", width)
        task = Task(
            checkpoint=model.checkpoint, folder=model.folder, width=held, threads=args.threads
        )
        sessions[width] = SYSTEMS[system].load(task)
        sessions[width].prepare(EAGER, ids_1T, steps)
    seconds: dict[str, list[list[float]]] = {width: [] for width in sessions}
    with progress_bar(args.rounds * len(sessions), model.name) as bar:
        for number in range(args.rounds):
            for width in list(sessions)[:: -1 if number % 2 else 1]:
                seconds[width].append(sessions[width].decode(EAGER, steps))
                bar.update(1)
    return [_row(width, turns, seconds[_PLAIN]) for width, turns in seconds.items()]


def _row(width: str, turns: list[list[float]], plain: list[list[float]]) -> dict[str, Any]:
    """Return what one model took, beside the untouched one in the same rounds."""
    ratios = [
        statistics.median(turn) / statistics.median(other)
        for turn, other in zip(turns, plain, strict=True)
    ]
    drawn = np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios)))
    resampled = np.median(drawn, axis=1)
    steps = [step for turn in turns for step in turn]
    return {
        "width": width,
        "ms_per_token": 1e3 * statistics.median(steps),
        "p95_ms_per_token": 1e3 * float(np.percentile(steps, 95)),
        "n": len(steps),
        "ratio": statistics.median(ratios),
        "ratio_interval": np.percentile(resampled, [2.5, 97.5]).tolist(),
    }


def _parser() -> Parser:
    ours = SYSTEMS["ours"]
    parser = Parser("Eager steps of the untouched model and of attached ones, in one process.")
    add_model_flags(parser)
    parser.add_argument(
        "--widths",
        nargs="+",
        choices=[width for width in ours.widths if not ours.needs_hints(width)],
        default=[LOSSLESS, "int8", "int4"],
        help=f"that are attached (default: {LOSSLESS} int8 int4)",
    )
    for flag, default, what in (
        ("--rounds", 60, "turns of each model"),
        ("--steps", 4, "timed in a turn"),
        ("--threads", os.cpu_count(), "that compute"),
    ):
        text = f"{what} (default: {default})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
