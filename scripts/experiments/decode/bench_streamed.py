"""Time steps of decoding under plans that stream weights, eager and compiled.

    python scripts/experiments/decode/bench_streamed.py
    python scripts/experiments/decode/bench_streamed.py --models smollm2 --widths int4 --shares 0.9

A process keeps the model at one width, under budgets that are shares of what its weights take in
fast memory; the rest comes from the disk for each token. Under each budget the same steps, with the
same static cache, take turns as they are and compiled, after one step that compiles. The ratio is
of the medians, above 1 compiled steps are the faster; ``link_ms`` is for how long anything was on
its way from the disk in a compiled step, which no step is faster than.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.errors import InputError
from lib.kconfig import ROOT
from lib.units import MIB
from scripts.experiments.decode.models import add_model_flags

LOSSLESS = "lossless"
_CONTEXT, _WARM_UP = 64, 2
_HEADS = (
    "model        width     share  streamed MiB  eager ms  compiled ms  ratio  link ms  first s"
)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if min(args.rounds, args.steps, args.threads) < 1:
        raise InputError("--rounds, --steps and --threads: at least 1")
    if not all(0 < share < 1 for share in args.shares):
        raise InputError("--shares: between 0 and 1, of what the weights take")
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
        for width in args.widths:
            rows += [{"model": name, **row} for row in _measure(model.checkpoint, width, args)]
    document = {
        "machine": describe_machine("cpu", args.threads, None),
        "context": _CONTEXT,
        "rows": rows,
    }
    lines = [_HEADS]
    lines += [
        f"{row['model']:<11}  {row['width']:<8}  {row['share']:5.2f}"
        f"  {row['streamed_bytes'] / MIB:12.1f}  {row['eager_ms']:8.1f}"
        f"  {row['compiled_ms']:11.1f}  {row['ratio']:5.2f}"
        f"  {row['link_ms']:7.1f}  {row['first_step_seconds']:7.1f}"
        for row in rows
    ]
    emit("\n".join(lines), document, args.json)
    return 0


def _measure(folder: Path, width: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of the document for each share."""
    import torch

    from lib.checkpoint.load import load
    from lib.tiering import attach

    precision = None if width == LOSSLESS else width
    model = load(folder)
    rows = []
    with (
        torch.no_grad(),
        attach(model, budget={"HBM": None, "SSD": None}, precision=precision, weights=folder) as r,
    ):
        full = r.plan.fast_bytes
        for share in args.shares:
            r.budget = {"HBM": int(full * share), "SSD": None}
            row = {"width": width, "share": share, **_measure_plan(model, r, args)}
            rows.append(row)
    return rows


def _measure_plan(model: Any, runtime: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Time both kinds of steps under the present plan."""
    steps = Steps(model, args.steps + _WARM_UP)
    runtime.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # that a step isn't compiled
        (first_seconds,) = steps.run(1, compiled=True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    link_seconds: list[float] = []
    for compiled in [False, True] * args.rounds:
        runtime.reset_stats()
        seconds[compiled] += steps.run(args.steps + _WARM_UP, compiled=compiled)[_WARM_UP:]
        if compiled:
            stats = runtime.stats()
            link_seconds.append(stats.link_seconds / stats.forwards)
    eager, compiled_ms = (statistics.median(seconds[each]) * 1e3 for each in (False, True))
    places = runtime.plan.placements.values()
    return {
        "n": len(seconds[True]),
        "streamed_bytes": sum(sum(place.unit_bytes) for place in places),
        "streamed_groups": sum(bool(place.unit_bytes) for place in places),
        "eager_ms": eager,
        "compiled_ms": compiled_ms,
        "ratio": eager / compiled_ms,
        "link_ms": statistics.median(link_seconds) * 1e3,
        "first_step_seconds": first_seconds,
    }


class Steps:
    """Greedy steps after one context, over and over, with a cache of fixed size."""

    def __init__(self, model: Any, room: int) -> None:
        import torch
        from transformers import StaticCache

        torch.manual_seed(0)
        ids_1T = torch.randint(0, model.config.vocab_size, (1, _CONTEXT))
        self._model = model
        self._cache: Any = StaticCache(config=model.config, max_cache_len=_CONTEXT + room)
        output = model(ids_1T, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._first_11 = output.logits[:, -1:].argmax(-1)

    def run(self, steps: int, *, compiled: bool) -> list[float]:
        """Return the seconds of each step. Of a compiled one all arguments have names."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(_CONTEXT)
        ids_11, seconds = self._first_11, []
        for _ in range(steps):
            given, named = ((), {"input_ids": ids_11}) if compiled else ((ids_11,), {})
            begin = time.perf_counter()
            output = self._model(*given, **named, past_key_values=self._cache, use_cache=True)
            ids_11 = output.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - begin)
        return seconds


def _parser() -> Parser:
    parser = Parser("Time steps of decoding under plans that stream weights, eager and compiled.")
    add_model_flags(parser)
    parser.add_argument(
        "--widths",
        nargs="+",
        default=["int4", "int8", LOSSLESS],
        help=f"of all matrices (default: int4 int8 {LOSSLESS})",
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=[0.95, 0.9, 0.75, 0.6],
        help="of what the weights take, in fast memory (default: 0.95 0.9 0.75 0.6)",
    )
    for flag, default, what in (
        ("--rounds", 9, "turns of each kind of step"),
        ("--steps", 16, "timed in a turn"),
        ("--threads", os.cpu_count(), "that compute"),
    ):
        text = f"{what} (default: {default})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
