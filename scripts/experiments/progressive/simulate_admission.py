"""How many requests go on at a time in a budget, and how many have memory: the scheduler alone.

    python scripts/experiments/progressive/simulate_admission.py --chat-model runs/demo/model

The load of bench_progressive.py on documents, all requests at once and none hard, with a token for
each that goes on in each step and 512 tokens of prompts at most; no model computes. Counted like
there. Table first; the last line of stdout is one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, output_file, run_main
from lib.commands.flags import whole_number
from lib.files import check_writable, write_json
from lib.progressive.active import LONGEST_WINDOW
from lib.progressive.bounds import Kind
from lib.progressive.ladder import BLOCK_TOKENS, KvShape, Ladder, make_ladder
from lib.progressive.runner import STEP_TOKENS
from lib.progressive.scheduler import Scheduler

KINDS = (Kind.FULL, Kind.CALIBRATED, Kind.VERIFIED)


@dataclass(slots=True, kw_only=True)
class Text:
    """A request on its way."""

    prompt: int
    left: int
    """Tokens of its answer to make."""
    computed: int = 0
    """Of its prompt."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    ladder, lengths = read_model(args)
    points = [
        {"fit": fit, "kind": kind, **simulate(ladder, kind, fit, lengths, args)}
        for fit in args.fit
        for kind in KINDS
    ]
    print(f"{'fit':>4} {'kind':<12}{'go on':>8}{'have memory':>13}")
    for p in points:
        print(f"{p['fit']:>4} {p['kind']:<12}{p['go_on']:8.2f}{p['have_memory']:13.2f}")
    document = {
        "prompt_tokens": lengths,
        "new_tokens": args.new_tokens,
        "compact_tier": args.compact,
        "points": points,
    }
    if args.json is not None:
        write_json(document, args.json)
    print(json.dumps(document))
    return 0


def read_model(args: argparse.Namespace) -> tuple[Ladder, list[int]]:
    """Return the ladder of a chat model in bf16, and lengths of prompts about documents."""
    from transformers import AutoConfig

    from lib.text.held_out import load_tokenizer
    from scripts.experiments.progressive.first_adequate_tier import read_documents

    config = AutoConfig.from_pretrained(args.chat_model)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = KvShape(
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        key_dim=dim,
        value_dim=dim,
        itemsize=2,
    )
    documents = read_documents(load_tokenizer(str(args.chat_model)), args.requests, seed=1)
    lengths = [min(args.prompt_tokens, len(ids)) for _, ids in documents]
    return make_ladder(shape).restrict(args.compact), lengths


def simulate(
    ladder: Ladder, kind: Kind, fit: int, lengths: Sequence[int], args: argparse.Namespace
) -> dict[str, Any]:
    """Return how many go on in a step, and have memory, on average."""
    new, full = args.new_tokens, ladder.full
    scheduler = Scheduler(
        ladder,
        fit * ladder.num_bytes(full, max(lengths) + new),
        window=LONGEST_WINDOW,
        growth_tokens=BLOCK_TOKENS,
        soft_quantile=0.5,
        history={Kind.CALIBRATED: (0, 100)},
    )
    waiting = {n: Text(prompt=length, left=new) for n, length in enumerate(lengths)}
    for number, text in waiting.items():
        tier = full if kind is Kind.FULL else 0
        drafts = kind is Kind.VERIFIED
        scheduler.submit(
            number, text.prompt, new, tier=tier, top_tier=full, kind=kind, drafts=drafts
        )
    running: dict[int, Text] = {}
    steps = went_on = had_memory = 0
    has_ended = False
    while waiting or running:
        running |= {number: waiting.pop(number) for number in scheduler.admit(0)}
        scheduler.granted()
        count = step(scheduler, running, new, settles=kind is Kind.CALIBRATED)
        if has_ended and waiting:
            steps, went_on, had_memory = steps + 1, went_on + count, had_memory + len(running)
        for number in [number for number, text in running.items() if not text.left]:
            scheduler.finish(number)
            del running[number]
            has_ended = True
    return {"go_on": went_on / max(1, steps), "have_memory": had_memory / max(1, steps)}


def step(scheduler: Scheduler, running: dict[int, Text], new: int, *, settles: bool) -> int:
    """Have all go on that can; return how many did."""
    room, count = STEP_TOKENS, 0
    for number, text in running.items():
        if not scheduler.grow(number, text.prompt + new - text.left) or (
            not room and text.computed < text.prompt
        ):
            continue
        count += 1
        if text.computed < text.prompt:
            rows = min(room, text.prompt - text.computed)
            text.computed, room = text.computed + rows, room - rows
            if text.computed < text.prompt:
                continue
            if settles:
                scheduler.settle(number)
        text.left -= 1
    return count


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Simulate who is admitted, and who goes on.")
    default = "(default: %(default)s)"
    parser.add_argument("--chat-model", type=Path, required=True, metavar="DIR", help="its cache")
    parser.add_argument(
        "--fit",
        type=whole_number(1),
        nargs="+",
        default=(2, 3, 5),
        metavar="N",
        help=f"of the longest requests, that fit the budget in full {default}",
    )
    for name, value, what in (
        ("--requests", 56, "all at once"),
        ("--prompt-tokens", 384, "of a prompt, at most"),
        ("--new-tokens", 320, "tokens of an answer"),
    ):
        parser.add_argument(
            name, type=whole_number(1), default=value, metavar="N", help=f"{what} {default}"
        )
    parser.add_argument("--compact", default="K4V4", metavar="TIER", help=f"compact tier {default}")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="the document, in a file")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
