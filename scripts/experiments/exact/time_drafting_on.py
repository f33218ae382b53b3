"""Time exact output whose draft rests during passes, and one whose draft may go on, in turns.

    python scripts/experiments/exact/time_drafting_on.py
    python scripts/experiments/exact/time_drafting_on.py --read-mb-s 300

SmolLM2 tells a story, greedily, with a compiled draft and the budget of the offload benchmark: a
text in each way, in one process, over and over; each way learns its own times. All texts must be
the same. ``--read-mb-s`` lets the kernel slow this process's reads (cgroup v1, as root). stdout
ends with one JSON document: {"tokens_per_s": {"rests", "goes_on"}, "ratios", "ratio": the median,
"ahead": tokens of a text that were drafted during the pass before, on average}.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.load import load
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import whole_number
from lib.errors import InputError
from lib.progressive.attach import attach
from lib.progressive.division import LONGEST
from lib.progressive.exact import ExactRuntime
from lib.progressive.windows import Windows
from scripts.experiments.offload.trained import find_trained

_BUDGET = {"HBM": "230MiB", "SSD": None}
_GROUPS = Path("/sys/fs/cgroup/blkio")
_WARM_UP_TOKENS = 64


class Resting(Windows):
    """Lets the draft rest while a pass runs."""

    def goes_on(self) -> bool:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    folder, trained = find_trained()
    model = load(folder)
    with (
        slow_reads(folder, args.read_mb_s),
        attach(model, trained.hints, budget=_BUDGET, exact=True, weights=folder) as runtime,
    ):
        assert isinstance(runtime, ExactRuntime)
        runtime.compile()
        document = compare(model, runtime, trained.prompt, rounds=args.rounds, tokens=args.tokens)
    emit_json(document, None)
    return 0


def compare(
    model: Any, runtime: ExactRuntime, prompt: Sequence[int], *, rounds: int, tokens: int
) -> dict[str, Any]:
    """Write the same text by turns; returns the document."""
    ways: dict[str, Windows] = {
        "rests": Resting(longest=LONGEST),
        "goes_on": Windows(longest=LONGEST),
    }
    ids_1T, texts = torch.tensor([list(prompt)]), []
    rates: dict[str, list[float]] = {way: [] for way in ways}
    ahead = dict.fromkeys(ways, 0)
    for number in range(rounds + 1):
        for way in sorted(ways, reverse=bool(number % 2)):
            runtime._pair.windows = ways[way]
            count = tokens if number else _WARM_UP_TOKENS
            runtime.reset_stats()
            begin = time.perf_counter()
            text_1T = model.generate(
                ids_1T, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )
            if number:
                rates[way].append(count / (time.perf_counter() - begin))
                texts.append(text_1T)
                ahead[way] += runtime.stats().drafting.ahead
    if not all(torch.equal(text_1T, texts[0]) for text_1T in texts):
        raise RuntimeError("the texts differ")
    ratios = [b / a for a, b in zip(rates["rests"], rates["goes_on"], strict=True)]
    return {
        "tokens_per_s": {way: statistics.median(rates[way]) for way in rates},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "ahead": ahead["goes_on"] / rounds,
    }


@contextlib.contextmanager
def slow_reads(folder: Path, mb_per_s: int | None) -> Iterator[None]:
    """Keep this process in a group whose reads of a folder's disk are slower; None: as they are."""
    if mb_per_s is None:
        yield
        return
    device = os.stat(folder).st_dev
    group = _GROUPS / f"tierhints-{os.getpid()}"
    rule = f"{os.major(device)}:{os.minor(device)} {mb_per_s * 10**6}"
    try:
        group.mkdir()
        (group / "blkio.throttle.read_bps_device").write_text(rule)
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise InputError(
            f"--read-mb-s needs cgroup v1 in {_GROUPS}, root, a whole disk: {error}"
        ) from error
    try:
        yield
    finally:
        (_GROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="time_drafting_on.py",
        description="Time exact output whose draft rests during passes, and one that may go on.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    parser.add_argument(
        "--rounds", type=whole_number(1), default=6, help="texts of each way (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number(2, 1000),
        default=160,
        help="of a text (default: %(default)s)",
    )
    parser.add_argument(
        "--read-mb-s", type=whole_number(1), help="limit of this process's reads (default: none)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
