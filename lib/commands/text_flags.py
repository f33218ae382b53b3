"""The text that a command measures on: its flags, how it is read, and the parts it is cut into."""

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .flags import add_seed_flag, whole_number

if TYPE_CHECKING:
    from ..text.held_out import HeldOutText
    from ..text.parts import TextParts


def add_text_flags(
    parser: argparse.ArgumentParser, *, samples: int, use: str, length: int = 512
) -> None:
    """Add the flags of ``read_held_out`` to a parser, ``use`` says what the sequences are for;
    ``length``: how many tokens each has by default.
    """
    parser.set_defaults(default_length=length)
    default = "(default: %(default)s)"
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        metavar="TEXT",
        help="UTF-8 text or JSON Lines: a file, a folder or a glob (default: the checkpoint's "
        "held-out text, else the standard library's)",
    )
    text.add_argument(
        "--samples",
        type=whole_number(1),
        default=samples,
        metavar="N",
        help=f"sequences, at most{use} {default}",
    )
    text.add_argument(
        "--sequence-length",
        type=whole_number(2),
        metavar="TOKENS",
        help=f"tokens per sequence (default: the model's context, at most {length})",
    )
    add_seed_flag(text, of="the choice of text and all else random")


def read_held_out(args: argparse.Namespace, model: Any) -> "HeldOutText":
    """Return the sequences that the flags ask for, in the model's vocabulary and context."""
    from ..text.held_out import read_text, sequence_length
    from ..text.parts import vocabulary_size

    return read_text(
        args.model,
        args.data,
        vocab_size=vocabulary_size(model),
        length=sequence_length(model.config, args.sequence_length, longest=args.default_length),
        count=args.samples,
        seed=args.seed,
    )


def read_parts(args: argparse.Namespace, model: Any) -> "TextParts":
    """Return what the flags ask for in three parts; InputError for fewer than two each."""
    from ..text.parts import PARTS, cut_parts

    text = read_held_out(args, model)
    if len(text.tokens) < 2 * PARTS:
        raise InputError(
            f"{text.source} has {len(text.tokens)} sequences of {text.tokens.shape[1]} tokens, and "
            f"gradients, calibration and judging need two each: give more text with --data, a "
            f"larger --samples or a shorter --sequence-length"
        )
    return cut_parts(text, seed=None if args.data is None else args.seed)
