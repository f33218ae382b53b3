"""Time exact output on slower disks: full weights read as residuals, and as they are.

    python scripts/experiments/exact/time_residuals.py --model runs/tuned_bf16 --budget 225MiB

The same model is attached twice, with the same draft; both compute in turns: a pass of 32 tokens,
and a text. Reads of the disk are throttled by a cgroup of blkio (v1, needs root), to each of
``--links`` (MB/s; 0: the disk as it is). Logits and texts must be the same, bit for bit. stdout
ends with one JSON document: by link, medians of both, and of the ratios of neighbours.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.load import load
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import add_model_flag, whole_number
from lib.errors import InputError
from lib.files import check_writable
from lib.machine import UNMEASURED, TierSpec
from lib.progress import show_progress
from lib.progressive.attach import attach
from lib.progressive.exact import ExactRuntime
from lib.vocabulary import Tier

_ROWS = 32
_SLOW = TierSpec("SSD", 100, 0.1)
"""What plans are made for: a disk on which residuals pay."""
_CGROUPS = Path("/sys/fs/cgroup/blkio")

Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    links = [int(link) for link in args.links.split(",")]
    with ExitStack() as stack:
        throttle = stack.enter_context(throttled(args.work_dir))
        models = {
            name: stack.enter_context(attached(args, name)) for name in ("residuals", "as_they_are")
        }
        for model in models.values():
            write(model, 2 * _ROWS)  # windows learn
        found = {}
        for link in show_progress(links, "links", total=len(links)):
            throttle(link)
            found[f"{link} MB/s" if link else "the disk"] = {
                "pass": compare(models, run_pass, args.rounds),
                "text": compare(models, lambda model: write(model, args.new_tokens), args.texts),
            }
        throttle(0)
    emit_json({"model": args.name, "new_tokens": args.new_tokens, "links": found}, args.json)
    return 0


@contextmanager
def attached(args: argparse.Namespace, name: str) -> Iterator[Any]:
    """Attach the model with its full weights as residuals, or as they are."""
    model = load(args.model)
    cannot = patch("lib.progressive.draft.decode_rate", return_value=0.0)
    with nullcontext() if name == "residuals" else cannot:
        runtime = attach(
            model,
            weights=args.model,
            budget={"HBM": args.budget, "SSD": None},
            exact=True,
            precision="int8",
            machine=replace(UNMEASURED, tiers={**UNMEASURED.tiers, Tier.SSD: _SLOW}),
            spill_dir=args.work_dir,
        )
    assert isinstance(runtime, ExactRuntime)
    if bool(runtime.draft.staging_bytes) != (name == "residuals"):
        raise InputError(f"--budget {args.budget} has no room for residuals: give more")
    with runtime:
        yield model


def compare(models: dict[str, Any], run: Callable[[Any], Tensor], rounds: int) -> Fields:
    """Run both in turns; returns seconds, those of the processor, and ratios of neighbours."""
    wall: dict[str, list[float]] = {name: [] for name in models}
    processor: dict[str, list[float]] = {name: [] for name in models}
    for index in range(rounds):
        results = []
        for name in sorted(models, reverse=bool(index % 2)):
            began, busy = time.perf_counter(), time.process_time()
            results.append(run(models[name]))
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - busy)
        assert torch.equal(*results), "residuals must not change anything"
    pairs = zip(wall["as_they_are"], wall["residuals"], strict=True)
    return {
        "seconds": {name: statistics.median(times) for name, times in wall.items()},
        "least_seconds": {name: min(times) for name, times in wall.items()},
        "processor_seconds": {name: statistics.median(times) for name, times in processor.items()},
        "times_as_fast": statistics.median(plain / coded for plain, coded in pairs),
    }


def run_pass(model: Any) -> Tensor:
    """Compute a pass over the full weights."""
    with torch.no_grad():
        logits: Tensor = model(torch.arange(_ROWS).view(1, -1)).logits
    return logits


def write(model: Any, tokens: int) -> Tensor:
    """Write a text, exactly."""
    ids = torch.arange(1, 17).view(1, -1)
    text: Tensor = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return text


@contextmanager
def throttled(folder: Path) -> Iterator[Callable[[int], None]]:
    """Join a cgroup; yields what sets the MB/s that it reads from the folder's disk."""
    folder.mkdir(parents=True, exist_ok=True)
    device = os.stat(folder).st_dev
    group = _CGROUPS / f"tierhints-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise InputError(f"no cgroup {group} can be made ({error.strerror}): be root") from error
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))

        def throttle(megabytes: int) -> None:
            limit = f"{os.major(device)}:{os.minor(device)} {megabytes * 10**6}"
            (group / "blkio.throttle.read_bps_device").write_text(limit)

        yield throttle
    finally:
        (_CGROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time exact output whose full weights are read as residuals.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    add_model_flag(parser)
    parser.add_argument("--name", default="model", help=f"in the document {default}")
    parser.add_argument("--budget", required=True, metavar="SIZE", help="of fast memory")
    parser.add_argument("--links", default="0,1000,500,250,100", metavar="N,...", help=default)
    parser.add_argument("--rounds", type=whole_number(1), default=12, metavar="N", help=default)
    parser.add_argument(
        "--texts", type=whole_number(1), default=3, metavar="N", help=f"of both {default}"
    )
    parser.add_argument("--new-tokens", type=whole_number(1), default=64, metavar="N", help=default)
    parser.add_argument(
        "--work-dir", type=Path, default=Path("/var/tmp/residuals"), metavar="DIR", help=default
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document here as well")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
