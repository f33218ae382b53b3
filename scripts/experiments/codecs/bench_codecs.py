"""Measure the codecs: bytes, error, speed of encoding, decoding and of products, by precision.

    python scripts/experiments/codecs/bench_codecs.py --json codecs.json

Products are of one matrix from memory (copies are cycled through, more than a cache holds) with 1,
16 and 128 rows of activations, in the resident form that a plan would hold (``prepare``) and
straight from the record (``EncodedWeight``, what a streamed block does). They are timed in turns
with fp32 ``F.linear`` in the same run, so that a busy machine slows both; medians are printed. The
last line of stdout is one JSON document.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.codecs.kernels import SCRATCH_BYTES, EncodedWeight, Scratch, Use, prepare
from lib.codecs.records import Codec, check_record, decode, default_codec, encode
from lib.commands.cli import emit_json, run_main
from lib.errors import InputError
from lib.files import check_writable
from lib.units import GB, MIB
from lib.vocabulary import Precision

SHAPES = ("1024x1024", "3072x1024", "4096x1024", "1024x4096")
"""GPT-2 medium's Linear weights, out x in features."""
ACTIVATION_ROWS = (1, 16, 128)
CYCLED_BYTES = 96 * MIB
"""Bytes of copies that a product goes through in turn: three times a large last-level cache."""

Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds}: at least 1")
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads {args.threads}: at least 1")
        torch.set_num_threads(args.threads)
    shapes = [_parse_shape(shape) for shape in args.shapes.split(",")]
    precisions = [_parse_precision(name) for name in args.precisions.split(",")]
    torch.manual_seed(0)
    jobs = [(shape, precision) for shape in shapes for precision in precisions]
    progress = tqdm(jobs, disable=not sys.stderr.isatty(), unit="codec")
    with torch.inference_mode():
        rows = [measure_codec(default_codec(p), shape, rounds=args.rounds) for shape, p in progress]
    print_table(rows)
    emit_json(
        {
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
            "rounds": args.rounds,
            "rows": rows,
        },
        args.json,
    )
    return 0


def measure_codec(codec: Codec, shape: tuple[int, int], *, rounds: int) -> Fields:
    """Measure one codec on one shape: medians of ``rounds``."""
    weight = torch.randn(shape)
    layout = codec.layout(*shape)
    record = encode(weight, codec)
    encoded = EncodedWeight(record, layout, dtype=torch.float32, scratch=Scratch(SCRATCH_BYTES))
    shard_rows = max(1, SCRATCH_BYTES // 8 // shape[1])

    def expand_all() -> None:
        for start in range(0, shape[0], shard_rows):
            encoded.expand(start, min(start + shard_rows, shape[0]))

    seconds = time_in_turns(
        {
            "encode": lambda: encode(weight, codec, out=record),
            "check": lambda: check_record(record, layout),
            "decode": expand_all,
        },
        rounds,
    )
    return {
        "precision": str(codec.precision),
        "group_size": codec.group_size,
        "rows": shape[0],
        "cols": shape[1],
        "bytes_per_weight": layout.num_bytes / weight.numel(),
        "error_normal": relative_error(weight, codec),
        "error_heavy_tailed": relative_error(heavy_tailed(shape), codec),
        "encode_gb_s": weight.nbytes / seconds["encode"] / GB,
        "check_gb_s": layout.num_bytes / seconds["check"] / GB,
        "decode_gweights_s": weight.numel() / seconds["decode"] / 1e9,
        "products": [
            measure_product(weight, record, codec, num_rows, rounds=rounds)
            for num_rows in ACTIVATION_ROWS
        ],
    }


def measure_product(
    weight: Tensor, record: Tensor, codec: Codec, num_rows: int, *, rounds: int
) -> Fields:
    """Time one product, resident, from the record and in fp32: billions of weights per second."""
    layout, scratch = codec.layout(*weight.shape), Scratch(SCRATCH_BYTES)
    x = torch.randn(num_rows, weight.shape[1])

    def copies_of(num_bytes: int) -> range:
        return range(-(-CYCLED_BYTES // num_bytes))

    resident = [
        prepare(
            record,
            layout,
            dtype=torch.float32,
            device="cpu",
            uses=frozenset({Use.LINEAR}),
            scratch=scratch,
        )
        for _ in copies_of(layout.num_bytes)
    ]
    from_record = [
        EncodedWeight(record.clone(), layout, dtype=torch.float32, scratch=scratch)
        for _ in copies_of(layout.num_bytes)
    ]
    full = cycle([weight.clone() for _ in copies_of(weight.nbytes)])
    held, encoded = cycle(resident), cycle(from_record)
    seconds = time_in_turns(
        {
            "resident": lambda: next(held).linear(x),
            "from_record": lambda: next(encoded).linear(x),
            "fp32": lambda: functional.linear(x, next(full)),
        },
        rounds,
        warmup=len(resident) if rounds > 1 else 1,
    )
    speeds = {name: weight.numel() / value / 1e9 for name, value in seconds.items()}
    return {
        "activation_rows": num_rows,
        **{f"{name}_gweights_s": speed for name, speed in speeds.items()},
    }


def time_in_turns(
    actions: dict[str, Callable[[], Any]], rounds: int, *, warmup: int = 1
) -> dict[str, float]:
    """Run each action in turn, ``rounds`` times; return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        for _ in range(min(warmup, 3)):
            action()
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def heavy_tailed(shape: tuple[int, int]) -> Tensor:
    """Draw weights from Student's t with 3 degrees of freedom: outliers of tens of deviations."""
    chi2 = torch.randn(3, *shape).square_().sum(0)
    return torch.randn(shape) / (chi2 / 3).sqrt_()


def relative_error(weight: Tensor, codec: Codec) -> float:
    """Return the root mean square of the error over that of the weights."""
    error = decode(encode(weight, codec), codec.layout(*weight.shape)) - weight
    return float(error.norm() / weight.norm())


def print_table(rows: list[Fields]) -> None:
    """Print one line per precision and shape; speeds of products are resident / record / fp32."""
    products = "".join(f"{f'M={count}':>20}" for count in ACTIVATION_ROWS)
    print(
        f"{'':24}{'bytes per':>10}{'relative error':>18}{'encode':>9}{'decode':>9}"
        f"   products in Gweights/s: resident / from record / fp32"
    )
    print(f"{'':24}{'weight':>10}{'normal':>9}{'t3':>9}{'GB/s':>9}{'Gw/s':>9}{products}")
    for row in rows:
        speeds = "".join(
            f"{product['resident_gweights_s']:8.2f} /{product['from_record_gweights_s']:4.1f} /"
            f"{product['fp32_gweights_s']:4.1f}"
            for product in row["products"]
        )
        name = f"{row['precision']} g{row['group_size'] or 'row'}"
        print(
            f"{name:12}{row['rows']:>6}x{row['cols']:<5}{row['bytes_per_weight']:>10.4f}"
            f"{row['error_normal']:>9.5f}{row['error_heavy_tailed']:>9.5f}"
            f"{row['encode_gb_s']:>9.2f}{row['decode_gweights_s']:>9.2f}{speeds}"
        )


def _parse_shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise InputError(f"shape {text!r}: give out x in features, such as 3072x1024")
    return int(rows), int(cols)


def _parse_precision(name: str) -> Precision:
    if name not in list(Precision):
        raise InputError(f"precision {name!r}: allowed are {', '.join(Precision)}")
    return Precision(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precisions", default=",".join(Precision), help="by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--shapes",
        default=",".join(SHAPES),
        help="out x in features, by commas (default: GPT-2 medium's, %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed runs of each (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
