"""Time the kernels of compressed weights alone, on matrices beyond the caches.

    python scripts/experiments/decode/bench_kernels.py
    python scripts/experiments/decode/bench_kernels.py --shapes 576x576 4096x4096 --rows 16

Many matrices of a shape, each in memory of its own, are multiplied one after the other by the same
activations. Widths take turns with one another and with reading as many bytes (the sum of an fp32
array): the share is that of the read bandwidth in the same rounds, medians both. 1 is the speed of
memory.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.errors import InputError
from lib.units import GB
from lib.vocabulary import Precision

WIDTHS = [Precision.INT8, Precision.INT6, Precision.INT5]
WIDTHS += [Precision.INT4, Precision.INT3, Precision.INT2]
_HEADS = "shape        width    GB/s  share  10^9 weights/s"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if min(args.rows, args.megabytes, args.rounds, args.threads) < 1:
        raise InputError("--rows, --megabytes, --rounds and --threads: at least 1")
    import torch

    from lib.codecs.native import VARIABLE
    from scripts.experiments.offload.host import describe_machine

    torch.set_num_threads(args.threads)
    rows = list(itertools.chain.from_iterable(_measure(shape, args) for shape in args.shapes))
    bandwidth = statistics.median(row["bandwidth_gb_s"] for row in rows)
    document = {
        "machine": describe_machine("cpu", args.threads, None),
        "instructions": os.environ.get(VARIABLE) or "the best here",
        "bandwidth_gb_s": bandwidth,
        "activation_rows": args.rows,
        "rows": rows,
    }
    lines = [f"memory is read at {bandwidth:.1f} GB/s", _HEADS]
    lines += [
        f"{row['shape']:<11}  {row['width']:<5}  {row['gb_s']:6.1f}  {row['bandwidth_share']:5.2f}"
        f"  {row['weights_per_second'] / 1e9:14.1f}"
        for row in rows
    ]
    emit("\n".join(lines), document, args.json)
    return 0


def _measure(shape: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of the document for each width."""
    import torch

    x = torch.randn(args.rows, shape[1])
    array = torch.ones(args.megabytes * 250_000)
    passes: dict[Precision | None, Callable[[], float]] = {None: lambda: _time(array.sum)}
    sizes: dict[Precision, tuple[int, int]] = {}
    for width in WIDTHS:
        passes[width], sizes[width] = _make_pass(width, shape, x, args.megabytes * 1e6)
    seconds: dict[Precision | None, list[float]] = {each: [] for each in passes}
    for warm_up in (True, *[False] * args.rounds):
        for each, run in passes.items():
            elapsed = run()
            if not warm_up:
                seconds[each].append(elapsed)
    bandwidth = array.nbytes / GB / statistics.median(seconds[None])
    rows = []
    for width, (count, num_bytes) in sizes.items():
        median = statistics.median(seconds[width])
        speed = count * num_bytes / GB / median
        rows.append(
            {
                "shape": f"{shape[0]}x{shape[1]}",
                "width": str(width),
                "matrices": count,
                "gb_s": speed,
                "bandwidth_gb_s": bandwidth,
                "bandwidth_share": speed / bandwidth,
                "weights_per_second": count * shape[0] * shape[1] / median,
            }
        )
    return rows


def _make_pass(
    width: Precision, shape: tuple[int, int], x: Any, num_bytes: float
) -> tuple[Callable[[], float], tuple[int, int]]:
    """Return what multiplies once by each of many matrices and says how long it took; how many
    there are, and the bytes of one.
    """
    import torch

    from lib.codecs import ops
    from lib.codecs.kernels import SCRATCH_BYTES
    from lib.codecs.layout import default_codec
    from lib.codecs.records import encode

    ops.prepare("cpu")
    codec = default_codec(width)
    record = encode(torch.randn(shape) * 0.02, codec)
    records = [record.clone() for _ in range(max(1, round(num_bytes / record.nbytes)))]
    layout = ops.layout_arguments(codec.layout(*shape))

    @torch.inference_mode()
    def multiply() -> None:
        for each in records:
            torch.ops.tierhints.linear(x, each, None, *layout, SCRATCH_BYTES)

    return lambda: _time(multiply), (len(records), record.nbytes)


def _time(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _parse_shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--shapes {text}: rows x columns, such as 1536x576")
    return int(parts[0]), int(parts[1])


def _parser() -> Parser:
    parser = Parser("Time the kernels of compressed weights alone, on matrices beyond the caches.")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_parse_shape,
        default=[(1536, 576), (4096, 4096)],
        metavar="ROWSxCOLS",
        help="of the matrices (default: 1536x576 4096x4096)",
    )
    for flag, default, what in (
        ("--rows", 1, "of activations"),
        ("--megabytes", 200, "of matrices of a width"),
        ("--rounds", 9, "passes over all matrices of a width"),
        ("--threads", os.cpu_count(), "of the kernels"),
    ):
        text = f"{what} (default: {default})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
