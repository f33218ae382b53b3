"""Answer a prompt with a model held within a memory budget.

    tierhints generate --model ./my-model --budget HBM=300MiB,SSD= --prompt "Once upon a time"

The checkpoint is never in memory as a whole: what the budget holds is, compressed if that is asked
for, and the rest is streamed. The text comes as it is generated, and after it one line: speed, fast
memory used of the budget, weight bytes moved per token, and what the text may differ by from that
of the full model.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..hints import Hints, load_hints
from ..precision.floors import read_trust
from ..tiering.planning.budget import parse_budget, read_budget
from .cli import STDOUT, Parser, add_json_flag, emit, printable
from .flags import (
    add_budget_flag,
    add_device_flag,
    add_hints_flag,
    add_model_flag,
    add_precision_flags,
    add_seed_flag,
    check_epsilon,
    flag_name,
    parse_device,
    planned_precision,
)

_EVERYTHING_FITS = "HBM="
_NEW_TOKENS = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Load, generate, print and emit; returns the exit code."""
    args = _parser().parse_args(argv)
    prompt = _read_prompt(args.prompt)
    if args.system is not None and not args.chat:
        raise InputError("--system has no effect without --chat: give both, or neither")
    if args.spill_dir is not None and args.spill_dir.exists() and not args.spill_dir.is_dir():
        raise InputError(f"--spill-dir {args.spill_dir} is no folder: give a folder on a disk")
    hints = _read_hints(args)
    device = parse_device(args.device)
    budget = parse_budget(read_budget(args.budget), device, "real")

    from ..checkpoint.hub import checkpoint_folder
    from ..checkpoint.load import load
    from ..checkpoint.models import quiet_transformers
    from ..evaluation.generate import (
        GenerationInterrupted,
        check_sampling,
        encode_prompt,
        generate,
        generation_figures,
    )
    from ..progressive.attach import attach
    from ..report.generation_line import closing_line
    from ..signals.summary import dtype_names
    from ..text.held_out import load_tokenizer

    check_sampling(
        args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        spell=flag_name,
    )
    folder = checkpoint_folder(args.model)
    if sys.stderr.isatty():
        print(f"loading {args.model}", file=sys.stderr)
    out = sys.stderr if args.json == STDOUT else sys.stdout
    quiet_transformers(progress=sys.stderr.isatty())
    shown = printable if out.isatty() else str
    start = time.perf_counter()
    model = load(folder)
    tokenizer = load_tokenizer(str(folder))
    ids = encode_prompt(tokenizer, prompt, chat=args.chat, system=args.system)
    with attach(
        model,
        hints,
        budget=budget,
        weights=folder,
        spill_dir=args.spill_dir,
        precision=planned_precision(args.precision),
        epsilon=args.epsilon,
        exact=args.exact,
        device=device,
    ) as runtime:
        if args.compile:
            runtime.compile()
        load_seconds = time.perf_counter() - start
        try:
            generation = generate(
                model,
                tokenizer,
                ids,
                runtime=runtime,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                seed=args.seed,
                on_text=lambda text: print(shown(text), end="", file=out, flush=True),
            )
        except GenerationInterrupted as interruption:
            generation = interruption.generation
        document: dict[str, Any] = {
            "model": args.model,
            "tier_hints": None if args.tier_hints is None else str(args.tier_hints),
            "budget": args.budget,
            "precision": args.precision,
            "epsilon": args.epsilon,
            "exact": args.exact,
            "dtype": dtype_names(model),
            "device": str(device),
            "sampling": {
                "temperature": args.temperature,
                "top_p": args.top_p,
                "top_k": args.top_k,
                "seed": args.seed,
            },
            "load_seconds": load_seconds,
            **generation_figures(runtime, generation),
        }
    emit(f"\n\n{closing_line(document)}", document, args.json)
    if generation.interrupted:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _read_prompt(given: str) -> str:
    where = "stdin" if given == "-" else "--prompt"
    try:
        prompt = given
        if given == "-":
            prompt = "" if sys.stdin is None else sys.stdin.read()  # None: it was closed
        prompt.encode()  # what isn't UTF-8 may also come as surrogates
    except UnicodeError as error:
        raise InputError(
            f"the prompt of {where} is not UTF-8 text ({error}): convert it"
        ) from error
    if not prompt.strip():
        raise InputError(f"the prompt of {where} is empty: give some text")
    return prompt


def _read_hints(args: argparse.Namespace) -> Hints | None:
    """Load the hints, and see that they can answer for an ``--epsilon``."""
    check_epsilon(args)
    hints = None if args.tier_hints is None else load_hints(args.tier_hints)
    if hints is not None and args.epsilon is not None:
        read_trust(hints.quality)
    return hints


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Answer a prompt with a model within a memory budget; the checkpoint is never in memory as "
        "a whole.",
        epilog="After Ctrl-C what was generated stands.",
    )
    default = "(default: %(default)s)"
    model = parser.add_argument_group("model")
    add_model_flag(model)
    add_hints_flag(model)
    add_device_flag(model)
    tiers = parser.add_argument_group("memory and quality")
    add_budget_flag(tiers, otherwise="%(default)s, all in fast memory")
    parser.set_defaults(budget=_EVERYTHING_FITS)
    add_precision_flags(tiers)
    tiers.add_argument(
        "--exact",
        nargs="?",
        const=True,
        default=False,
        choices=["strict"],
        help="write the full model's own text: a compressed copy drafts it (of --precision or "
        "--epsilon, default: the one predicted to be the fastest), passes over the full weights "
        "check it; strict: near ties are computed as without a draft",
    )
    tiers.add_argument(
        "--compile",
        action="store_true",
        help="compile what decodes token by token: takes a minute the first time",
    )
    tiers.add_argument(
        "--spill-dir",
        type=Path,
        metavar="DIR",
        help="folder of the SSD tier, kept for the next run (default: a temporary one, and "
        "compressed weights in .tierhints beside the model's)",
    )
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; -: stdin")
    text.add_argument("--chat", action="store_true", help="ask it in the tokenizer's chat template")
    text.add_argument("--system", metavar="TEXT", help="with --chat, the system message")
    text.add_argument(
        "--max-new-tokens",
        type=int,
        default=_NEW_TOKENS,
        metavar="N",
        help=f"tokens to write, at most, and within the model's context {default}",
    )
    text.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the most likely token each time, after what the model's generation_config.json "
        f"sets but sampling, so that a command gives the same text again; above: sample {default}",
    )
    text.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest so much of probability"
    )
    text.add_argument("--top-k", type=int, metavar="K", help="sample from the likeliest K tokens")
    add_seed_flag(text, of="sampling")
    add_json_flag(parser)
    return parser
