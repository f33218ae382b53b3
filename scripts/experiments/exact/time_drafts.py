"""Time exact output with the draft that is chosen, and with one of a width, in turns.

    python scripts/experiments/exact/time_drafts.py --budget 110MiB --precision int4

SmolLM2 continues code and prose, sampled at temperature 1, with compiled drafts: each text is
written with both, in one process, and must be the same. stdout ends with one JSON document:
{"drafts": {NAME: {"tokens_per_s": the median, "acceptance", "mean_window"}}, "ratios": chosen over
given, by text, "ratio": the median}.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.load import load
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import whole_number
from lib.errors import InputError
from lib.progressive.attach import attach
from lib.progressive.division import WIDTHS
from lib.progressive.exact import ExactRuntime
from lib.text.held_out import load_tokenizer
from scripts.experiments.exact.prompts import read_prompts
from scripts.experiments.offload.trained import find_trained

_KINDS = ("code", "prose")
_PROMPT_TOKENS = 32
_WARM_UP = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    folder, trained = find_trained()
    tokenizer = load_tokenizer(str(folder))
    prompts = [
        torch.tensor(read_prompts(tokenizer, _KINDS[n % 2], count=1, tokens=_PROMPT_TOKENS, seed=n))
        for n in range(args.texts)
    ]
    with contextlib.ExitStack() as stack:
        sides: dict[str, tuple[Any, ExactRuntime]] = {}
        for precision in (args.precision, None):
            model: Any = load(folder)
            runtime = stack.enter_context(
                attach(
                    model,
                    trained.hints,
                    budget={"HBM": args.budget, "SSD": None},
                    exact=True,
                    precision=precision,
                    weights=folder,
                )
            )
            assert isinstance(runtime, ExactRuntime)
            runtime.compile()
            model.generate(prompts[0], **_WARM_UP)
            runtime.reset_stats()
            sides[str(runtime.draft.name)] = model, runtime
        if len(sides) < 2:
            raise InputError(f"--precision {args.precision} is what is chosen: give another")
        emit_json(compare(sides, prompts, tokens=args.tokens), None)
    return 0


def compare(
    sides: dict[str, tuple[Any, ExactRuntime]], prompts: Sequence[torch.Tensor], *, tokens: int
) -> dict[str, Any]:
    """Write each text with both drafts; returns the document."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for seed, ids_1T in enumerate(prompts):
        texts = []
        for name in sorted(sides, reverse=bool(seed % 2)):
            torch.manual_seed(seed)
            begin = time.perf_counter()
            text_1T = sides[name][0].generate(
                ids_1T,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                pad_token_id=0,
            )
            rates[name].append(tokens / (time.perf_counter() - begin))
            texts.append(text_1T)
        if not torch.equal(*texts):
            raise RuntimeError("the texts differ")
    given, chosen = sides
    ratios = [b / a for a, b in zip(rates[given], rates[chosen], strict=True)]
    drafts = {}
    for name, (_, runtime) in sides.items():
        stats = runtime.stats().drafting
        drafts[name] = {
            "tokens_per_s": statistics.median(rates[name]),
            "acceptance": stats.acceptance,
            "mean_window": stats.drafted / max(stats.windows, 1),
        }
    return {"drafts": drafts, "ratios": ratios, "ratio": statistics.median(ratios)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="time_drafts.py",
        description="Time exact output with the draft that is chosen, and with one of a width.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    parser.add_argument("--budget", default="110MiB", metavar="SIZE", help=f"of both {default}")
    parser.add_argument(
        "--precision", default="int4", choices=[str(width) for width in WIDTHS], help=default
    )
    parser.add_argument("--texts", type=whole_number(1), default=8, metavar="N", help=default)
    parser.add_argument(
        "--tokens", type=whole_number(2, 1000), default=64, metavar="N", help=f"of each {default}"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
