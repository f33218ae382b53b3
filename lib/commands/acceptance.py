"""Measure how often a model would have chosen its compressed copy's token, at each width.

    tierhints acceptance --model ./my-model --tier-hints tier_hints.json

The model continues some text, greedily and sampled at temperature 1; at each new token both say
what comes next. That is what ``generate --exact`` accepts of its draft.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..hints import load_hints
from ..vocabulary import Precision
from .cli import Parser, add_json_flag, emit
from .flags import add_hints_flag, add_model_flag, whole_number
from .text_flags import add_text_flags, read_held_out

_PROMPT_TOKENS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and emit; returns the exit code."""
    args = _parser().parse_args(argv)
    hints = None if args.tier_hints is None else load_hints(args.tier_hints)

    from ..checkpoint.hub import checkpoint_folder
    from ..checkpoint.load import load
    from ..checkpoint.models import quiet_transformers
    from ..evaluation.acceptance import measure_acceptance

    folder = checkpoint_folder(args.model)
    quiet_transformers(progress=sys.stderr.isatty())
    model = load(folder)
    text = read_held_out(args, model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and text.tokens.shape[1] + args.new_tokens > context:
        raise InputError(
            f"--new-tokens {args.new_tokens} behind {text.tokens.shape[1]} of the prompt pass the "
            f"model's context of {context}: give at most {context - text.tokens.shape[1]}"
        )
    found = measure_acceptance(
        model, folder, text.tokens, hints, new_tokens=args.new_tokens, seed=args.seed
    )
    bits = {str(_bits(precision)): each.to_json() for precision, each in found.items()}
    document = {
        "model": args.model,
        "tier_hints": None if args.tier_hints is None else str(args.tier_hints),
        "text": {"source": text.source, "prompts": len(text.tokens)},
        "new_tokens": args.new_tokens,
        "bits": bits,
    }
    head = f"{args.model}, {len(text.tokens)} prompts, {args.new_tokens} new tokens each"
    emit(f"{head}\n\n{_table(bits)}", document, args.json)
    return 0


def _bits(precision: Precision) -> int:
    return int(str(precision).removeprefix("int"))


def _table(bits: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'bits':4}  {'greedy':>7}  {'sampled':>7}  {'predicted':>9}  {'KL':>8}"]
    for name, each in bits.items():
        predicted = "-" if each["predicted"] is None else f"{each['predicted']:.3f}"
        lines.append(
            f"{name:>4}  {each['greedy']:7.3f}  {each['sampled']:7.3f}  {predicted:>9}  "
            f"{each['kl_nats']:8.4f}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Measure how often a model would have chosen its compressed copy's token, at each width."
    )
    model = parser.add_argument_group("model")
    add_model_flag(model)
    add_hints_flag(model)
    add_text_flags(parser, samples=8, use=", that the model continues", length=_PROMPT_TOKENS)
    parser.add_argument(
        "--new-tokens",
        type=whole_number(2),
        default=96,
        metavar="N",
        help="tokens that it adds to each (default: %(default)s)",
    )
    add_json_flag(parser)
    return parser
