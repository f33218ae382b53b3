"""Where the processor time of a step goes: full precision, compact pages, and drafts with checks.

    python scripts/experiments/progressive/profile_steps.py --chat-model runs/demo/model

So many requests about documents decode together, each at its place in its answer, after their
prompts are there. Milliseconds are processor time of the engine's thread, torch on one thread, so
that other work on the machine counts for little. A part contains what its functions call. Table
first; the last line of stdout is one JSON document.
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, output_file, run_main
from lib.commands.flags import whole_number
from lib.files import check_writable, write_json
from lib.machine import cpu_name
from lib.progressive import active, batch, served
from lib.progressive.bounds import QualityBound
from lib.progressive.engine import Engine
from lib.progressive.generation import GenerationRequest
from lib.progressive.runner import Runner
from scripts.experiments.progressive.bench_progressive import DTYPES, draw_documents
from scripts.experiments.progressive.loads import submit

KINDS = ("full", "compact", "verified")
PARTS: dict[str, tuple[Any, str]] = {
    "all": (Runner, "go_on"),
    "model": (served.ServedModel, "run"),
    "attention over pages": (batch, "attend"),
    "attention of passes": (batch.Batch, "_pass"),
    "read originals": (batch.Batch, "_wait_for"),
    "put together": (batch, "assemble"),
    "torch's attention": (batch, "attend_causal"),
    "largest, normalizers": (served, "score"),
    "make pages": (active.Active, "_settle"),
    "KL": (active, "divergences_of"),
}
"""What is measured, indented below what contains it in ``print_table``."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    torch.set_num_threads(1)
    args.calibration, args.pool = 0, args.at_a_time
    model, requests = draw_documents(args)
    rows = [profile(model, requests, kind, args) for kind in KINDS]
    document = {
        "cpu": cpu_name(),
        "dtype": args.dtype,
        "compact_tier": args.compact,
        "at_a_time": args.at_a_time,
        "prompt_tokens": [len(each.prompt) for each in requests],
        "new_tokens": args.new_tokens,
        "kinds": dict(zip(KINDS, rows, strict=True)),
    }
    print_table(document)
    if args.json is not None:
        write_json(document, args.json)
    print(json.dumps(document))
    return 0


def profile(
    model: Any, requests: Sequence[GenerationRequest], kind: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Return milliseconds of a step, and of a token, by part."""
    bound = QualityBound(epsilon=args.epsilon) if kind == "verified" else None
    of_kind = [
        GenerationRequest(prompt=each.prompt, max_new_tokens=each.max_new_tokens, bound=bound)
        for each in requests
    ]
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    with (
        timed(seconds, calls),
        Engine(model, kv_budget=2**31, ladder=args.compact, prefix_bytes=0) as engine,
    ):
        answers = submit(engine, of_kind, tier=0 if kind == "compact" else None)
        while not all(answer.times for answer in answers):
            time.sleep(0.01)
        first, before, called = engine.stats(), dict(seconds), Counter(calls)
        for answer in answers:
            answer.result()
        last = engine.stats()
    steps = last.steps - first.steps
    tokens = sum(n for answer in answers for _, n in answer.times[1:])
    spent = {part: 1e3 * (seconds[part] - before.get(part, 0.0)) / steps for part in PARTS}
    return {
        "steps": steps,
        "checks": (calls["KL"] - called["KL"]) / steps,
        "rejected": last.rejected_tokens,
        "ms_per_token": spent["all"] * steps / tokens,
        "ms_per_step": spent,
    }


@contextmanager
def timed(seconds: dict[str, float], calls: Counter[str]) -> Iterator[None]:
    """Count the seconds and calls of each part, in the thread that makes them."""
    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            call = getattr(owner, name)
            stack.callback(setattr, owner, name, call)
            setattr(owner, name, _timer(call, part, seconds, calls))
        yield


def _timer(
    call: Callable[..., Any], part: str, seconds: dict[str, float], calls: Counter[str]
) -> Callable[..., Any]:
    def timer(*args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[part] += time.thread_time() - begin
            calls[part] += 1

    return timer


def print_table(document: dict[str, Any]) -> None:
    """Print what was found, for a person."""
    kinds = document["kinds"]
    print(f"{'ms of a step':<24}" + "".join(f"{kind:>10}" for kind in kinds))
    for part in PARTS:
        print(
            f"{part:<24}" + "".join(f"{each['ms_per_step'][part]:10.2f}" for each in kinds.values())
        )
    for name in ("checks", "ms_per_token"):
        print(f"{name:<24}" + "".join(f"{each[name]:10.2f}" for each in kinds.values()))


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Profile the steps of an engine by kind of request.")
    default = "(default: %(default)s)"
    parser.add_argument("--chat-model", type=Path, required=True, metavar="DIR", help="to profile")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help=f"of the model and its cache {default}"
    )
    for name, value, what in (
        ("--at-a-time", 8, "requests that decode together"),
        ("--prompt-tokens", 384, "of a prompt, at most"),
        ("--new-tokens", 160, "tokens of an answer"),
    ):
        parser.add_argument(
            name, type=whole_number(1), default=value, metavar="N", help=f"{what} {default}"
        )
    parser.add_argument("--compact", default="K4V4", metavar="TIER", help=f"compact tier {default}")
    parser.add_argument(
        "--epsilon", type=float, default=0.006, metavar="NATS", help=f"of verified ones {default}"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="the document, in a file")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
