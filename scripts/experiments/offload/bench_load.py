"""Measure the way from a checkpoint on the disk to a model's first token, beside reading the file.

    python scripts/experiments/offload/bench_load.py --model ./my-model --precisions int4,int8

In turns: the checkpoint's files are read with direct reads, and as ``cat`` reads them; and a new
process builds the model (``load``), attaches it at a precision and computes one token. The files
are dropped from the page cache before each. Importing Python packages comes before that and is
timed by itself. The ratios are of the process to the two ways of reading: 1 is the disk's speed;
"cpu" is processor time of the three stages.
Each precision is loaded twice: what is "again" finds the records that the load before it has kept,
in a folder beside the model's. ``--no-records`` keeps none, and ``--in-memory`` has transformers
load the model, so that attach writes its originals to the disk.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.errors import InputError
from lib.tiering.stores.records import RECORDS_VARIABLE
from lib.units import GB, KIB, MIB
from lib.vocabulary import Precision
from scripts.experiments.offload.host import describe_machine
from scripts.experiments.offload.page_cache import drop_page_cache

READ_BYTES = 4 * MIB
STAGES = ("load", "attach", "first_token")
Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.worker is not None:
        print(json.dumps(run_once(args)))
        return 0
    files = sorted(args.model.glob("*.safetensors"))
    if not files:
        raise InputError(f"--model {args.model}: a folder with safetensors files is needed")
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds}: at least 1")
    precisions = [_parse_precision(name) for name in args.precisions.split(",")]
    keeps = not (args.in_memory or args.no_records)
    jobs = [precision for precision in precisions for _ in range(args.rounds)]
    runs: dict[tuple[Precision, bool], list[Fields]] = {}
    for precision in tqdm(jobs, disable=not sys.stderr.isatty(), unit="round"):
        with tempfile.TemporaryDirectory(dir=args.model.parent, prefix=".bench-load-") as folder:
            for again in (False, True) if keeps else (False,):
                read_seconds = sum(read_directly(file) for file in files)
                drop_page_cache(args.model)
                cat_seconds = sum(read_like_cat(file) for file in files)
                run = start_worker(args, precision, records=folder if keeps else "")
                seconds = sum(run[stage] for stage in STAGES)
                run |= {"read": read_seconds, "cat": cat_seconds, "total": seconds}
                run |= {"ratio": seconds / read_seconds, "cat_ratio": seconds / cat_seconds}
                runs.setdefault((precision, again), []).append(run)
    num_bytes = sum(file.stat().st_size for file in files)
    document = {
        "model": str(args.model),
        "file_bytes": num_bytes,
        "rounds": args.rounds,
        "in_memory": args.in_memory,
        "records": keeps,
        "machine": describe_machine("cpu", args.threads or os.cpu_count() or 1, None),
        "results": [summarize(*case, found, num_bytes) for case, found in runs.items()],
    }
    emit(format_table(document["results"]), document, args.json)
    return 0


def read_directly(path: Path) -> float:
    """Read a file in order with direct reads and nothing else; returns the seconds."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, READ_BYTES) as buffer:
            start, offset = time.perf_counter(), 0
            while count := os.preadv(descriptor, [buffer], offset):
                offset += count
            return time.perf_counter() - start
    finally:
        os.close(descriptor)


def read_like_cat(path: Path) -> float:
    """Read a file in order, 128 KiB at a time, through the page cache; returns the seconds."""
    with path.open("rb", buffering=0) as file:
        buffer, start = bytearray(128 * KIB), time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - start


def start_worker(args: argparse.Namespace, precision: Precision, *, records: str) -> Fields:
    """Run one load in a process of its own; returns the seconds of each stage. ``records``: the
    folder in which they are kept; empty: nowhere.
    """
    command = [sys.executable, "-W", "ignore", "-m", "scripts.experiments.offload.bench_load"]
    command += ["--model", str(args.model)]
    command += ["--worker", str(precision)]
    command += ["--in-memory"] if args.in_memory else []
    command += ["--threads", str(args.threads)] if args.threads else []
    environment = {**os.environ, RECORDS_VARIABLE: records}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the run at {precision} failed: {done.stderr.strip()[-500:]}")
    result: Fields = json.loads(done.stdout.splitlines()[-1])
    return result


def run_once(args: argparse.Namespace) -> Fields:
    """Go from the files to the first token, in this process, and time the stages."""
    begin = time.perf_counter()
    import torch

    from lib.checkpoint.models import quiet_transformers
    from lib.tiering import attach, load

    quiet_transformers(progress=False)
    if args.threads:
        torch.set_num_threads(args.threads)
    model_class = type(load(args.model))  # its module is imported, and transformers' own tables
    times = {"imports": time.perf_counter() - begin}
    drop_page_cache(args.model)

    def lap(stage: str, start: float) -> float:
        now = time.perf_counter()
        times[stage] = now - start
        return now

    ids = torch.arange(1, 9)[None]
    with torch.inference_mode(False), torch.no_grad():
        start, processor = time.perf_counter(), time.process_time()
        if args.in_memory:
            model = model_class.from_pretrained(args.model)
        else:
            model = load(args.model)
        start = lap("load", start)
        runtime = attach(
            model,
            weights=None if args.in_memory else args.model,
            precision=args.worker,
            budget={"HBM": None, "SSD": None},
        )
        start = lap("attach", start)
        model(ids).logits[0, -1].argmax().item()
        lap("first_token", start)
        times["processor"] = time.process_time() - processor
        runtime.detach()
    return times


def summarize(precision: Precision, again: bool, runs: Sequence[Fields], num_bytes: int) -> Fields:
    """Return the medians of the runs at one precision."""
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {
        "precision": str(precision),
        "again": again,
        "seconds": {
            key: median[key] for key in ("imports", *STAGES, "total", "processor", "read", "cat")
        },
        "read_gb_s": num_bytes / median["read"] / GB,
        "load_gb_s": num_bytes / median["total"] / GB,
        "ratio": median["ratio"],
        "cat_ratio": median["cat_ratio"],
        "ratios": [run["ratio"] for run in runs],
    }


def format_table(results: Sequence[Fields]) -> str:
    """Return one line per precision: medians, in seconds."""
    lines = [
        f"{'precision':<12}{'load':>7}{'attach':>8}{'token':>7}{'total':>7}{'cpu':>7}"
        f"{'read file':>11}{'ratio':>7}{'cat':>7}{'ratio':>7}   (seconds, medians; imports before)"
    ]
    for result in results:
        seconds = result["seconds"]
        name = result["precision"] + " again" * result["again"]
        lines.append(
            f"{name:<12}{seconds['load']:>7.2f}{seconds['attach']:>8.2f}"
            f"{seconds['first_token']:>7.2f}{seconds['total']:>7.2f}"
            f"{seconds['processor']:>7.2f}{seconds['read']:>11.2f}"
            f"{result['ratio']:>7.2f}{seconds['cat']:>7.2f}{result['cat_ratio']:>7.2f}"
            f"   ({seconds['imports']:.1f})"
        )
    return "\n".join(lines)


def _parse_precision(name: str) -> Precision:
    if name not in list(Precision):
        raise InputError(f"precision {name!r}: allowed are {', '.join(Precision)}")
    return Precision(name)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a folder of transformers"
    )
    parser.add_argument(
        "--precisions", default="int4,int8", help="by commas (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--no-records", action="store_true", help="keep none for a second load")
    parser.add_argument(
        "--in-memory", action="store_true", help="load the model with transformers first"
    )
    parser.add_argument("--worker", metavar="PRECISION", help=argparse.SUPPRESS)
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
