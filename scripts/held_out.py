"""The text that a command measures on: its flags, how it is read, and the parts it is cut into."""

import argparse
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.errors import InputError
from scripts.inputs import HeldOutText, read_text, sequence_length

PARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TextParts:
    """Three disjoint parts of a text, each (N, T) token ids: gradients are taken on the first,
    predictions are fitted on the second, and nothing but judged on the third.
    """

    fisher: Tensor
    calibration: Tensor
    judging: Tensor
    source: str
    seed: int | None
    """That drew the sequences; the checkpoint's own are taken in their order."""

    @property
    def digest(self) -> str:
        """Identify the tokens and how they are cut, wherever they were read from."""
        digest = hashlib.sha256()
        for part in (self.fisher, self.calibration, self.judging):
            digest.update(f"{tuple(part.shape)};".encode())
            digest.update(part.to(torch.int64).cpu().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def to_json(self) -> dict[str, Any]:
        """Say what was read: the same digest, the same parts."""
        return {
            "source": self.source,
            "digest": self.digest,
            "sequence_length": self.fisher.shape[1],
            "seed": self.seed,
            "fisher_sequences": len(self.fisher),
            "calibration_sequences": len(self.calibration),
            "judging_sequences": len(self.judging),
        }


def add_text_flags(parser: argparse.ArgumentParser, *, samples: int, use: str) -> None:
    """Add the flags of ``read_held_out`` to a parser, ``use`` says what the sequences are for."""
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
        type=int,
        default=samples,
        metavar="N",
        help=f"sequences, at most{use} {default}",
    )
    text.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="tokens per sequence (default: the model's context, at most 512)",
    )
    text.add_argument(
        "--seed", type=int, default=0, help=f"of the choice of text and all else random {default}"
    )


def read_held_out(args: argparse.Namespace, model: Any) -> HeldOutText:
    """Return the sequences that the flags ask for, in the model's vocabulary and context."""
    return read_text(
        args.model,
        args.data,
        vocab_size=vocabulary_size(model),
        length=sequence_length(model.config, args.sequence_length),
        count=args.samples,
        seed=args.seed,
    )


def read_parts(args: argparse.Namespace, model: Any) -> TextParts:
    """Return what the flags ask for in three parts; InputError for fewer than two each."""
    text = read_held_out(args, model)
    if len(text.tokens) < 2 * PARTS:
        raise InputError(
            f"{text.source} has {len(text.tokens)} sequences of {text.tokens.shape[1]} tokens, and "
            f"gradients, calibration and judging need two each: give more text with --data, a "
            f"larger --samples or a shorter --sequence-length"
        )
    return cut_parts(text, seed=None if args.data is None else args.seed)


def cut_parts(text: HeldOutText, *, seed: int | None) -> TextParts:
    """Cut a text in three.

    Sequences take turns: neighbours come from the same documents, and what is calibrated on one
    part holds for another of the same distribution.
    """
    fisher, calibration, judging = (text.tokens[part::PARTS] for part in range(PARTS))
    return TextParts(
        fisher=fisher,
        calibration=calibration,
        judging=judging,
        source=text.source,
        seed=seed,
    )


def vocabulary_size(model: Any) -> int:
    """Return the number of tokens that a causal language model knows."""
    return int(model.config.get_text_config().vocab_size)
