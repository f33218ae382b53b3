"""Measure a signal of a causal language model on text, such as its Fisher information, and write
its tier hints.

Works on any Hugging Face checkpoint, without training: for models that were trained elsewhere, with
an optimizer that keeps no second moment, or with frozen blocks.

    tierhints collect --model openai-community/gpt2 --data book.txt --samples 32
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..hints import save_hints
from ..progress import progress_bar
from ..text.files import find_text_files, make_sequences, read_chunks
from ..units import parse_thresholds
from .cli import Parser, add_json_flag, emit, output_file
from .flags import add_device_flag, add_model_flag, add_seed_flag, parse_device, whole_number
from .tier_table import add_tier_flags, summarize_tiers, tier_table

SAMPLES, LENGTH = 32, 256
"""Sequences, and tokens of each. From 16 of 256 tokens the traces of SmolLM2-135M's blocks have
standard errors of 5 % in the median and 11 % at most."""

_COUNTS = ("labels", "tokens", "sequences", "draws")
"""What the result takes from the provenance, where the signal has it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure, write the hints and print the result."""
    args = _parser().parse_args(argv)
    hbm_threshold, cpu_threshold = parse_thresholds(
        args.hbm_threshold, args.cpu_threshold, names=("--hbm-threshold", "--cpu-threshold")
    )
    files = find_text_files(args.data)

    import torch

    from ..checkpoint.models import cast_weights, load_model, quiet_transformers
    from ..signals import FisherTrace
    from ..signals.collect import collect_hints
    from ..signals.interface import SIGNALS
    from ..text.held_out import load_tokenizer, sequence_length

    device = parse_device(args.device)
    kind = SIGNALS[args.signal]
    is_fisher = kind is FisherTrace
    signal = kind()
    if is_fisher:
        signal = FisherTrace(
            labels=args.labels or "sampled",
            keep_diagonal=args.save_diagonal is not None,
            seed=args.seed,
        )
    elif args.labels is not None or args.save_diagonal is not None:
        raise InputError(
            f"--labels and --save-diagonal have no effect with --signal {args.signal}: leave them "
            "out, or use --signal fisher_trace"
        )
    quiet_transformers(progress=sys.stderr.isatty())
    # The model first: its errors say more about a wrong name than those of a tokenizer.
    model: Any = load_model(args.model)
    cast_weights(model, getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.model)
    length = sequence_length(model.config, args.sequence_length, longest=LENGTH)
    tokens = make_sequences(
        tokenizer,
        read_chunks(files, seed=args.seed),
        length=length,
        count=args.samples,
        data=args.data,
    )
    if len(tokens) < args.samples:
        raise InputError(
            f"--data {args.data!r} holds {len(tokens)} sequences of {length} tokens, not "
            f"{args.samples}: give more text, a smaller --samples or a shorter --sequence-length"
        )
    model.to(device)
    begin = time.perf_counter()
    with progress_bar(args.samples, signal.name, unit="seq") as bar:
        hints, found = collect_hints(
            model.eval(),
            tokens,
            signal,
            batch_size=args.batch_size,
            hbm_threshold=hbm_threshold,
            cpu_threshold=cpu_threshold,
            diagonal=args.save_diagonal,
            model_id=args.model,
            source=args.data,
            progress=bar.update,
        )
    seconds = time.perf_counter() - begin
    save_hints(hints, args.output)
    tiers = summarize_tiers(hints, found.mass)
    emit(
        tier_table(hints, tiers, "Fisher information" if is_fisher else signal.name),
        {
            "output": str(args.output),
            "diagonal": None if args.save_diagonal is None else str(args.save_diagonal),
            "model": args.model,
            "signal": signal.name,
            **{key: found.provenance[key] for key in _COUNTS if key in found.provenance},
            "sequence_length": length,
            signal.name: sum(found.mass.values()),
            "blocks": len(hints.blocks),
            "tiers": tiers,
            "seconds": round(seconds, 3),
            "device": str(device),
            "dtype": args.dtype,
        },
        args.json,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.split("\n\n")[0].strip())
    default = "(default: %(default)s)"
    what = parser.add_argument_group("what is measured")
    add_model_flag(what)
    what.add_argument(
        "--signal",
        default="fisher_trace",
        metavar="NAME",
        help="fisher_trace, router_counts, or one that a module of $TIERHINTS_PLUGINS registers; "
        f"docs/extending.md {default}",
    )
    what.add_argument(
        "--data", required=True, help="UTF-8 text or JSON Lines: a file, a folder or a glob"
    )
    what.add_argument(
        "--samples",
        type=whole_number(1),
        default=SAMPLES,
        metavar="N",
        help=f"sequences of text {default}",
    )
    what.add_argument(
        "--sequence-length",
        type=whole_number(2),
        metavar="TOKENS",
        help=f"tokens per sequence (default: the model's context, at most {LENGTH})",
    )
    what.add_argument(
        "--labels",
        choices=("sampled", "data"),
        help="sampled from the model: true Fisher; the text's own: empirical, biased "
        "(default: sampled)",
    )
    what.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=1,
        metavar="N",
        help=f"sequences per backward pass; fewer are slower and, per text, more exact {default}",
    )
    add_seed_flag(what, of="the choice of text and of the labels")
    how = parser.add_argument_group("how it is computed")
    add_device_flag(how)
    how.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help=f"of weights and gradients; bfloat16 halves the memory {default}",
    )
    out = parser.add_argument_group("what is written")
    add_tier_flags(out)
    out.add_argument(
        "--save-diagonal",
        type=output_file,
        metavar="FILE",
        help="also write the Fisher diagonal, per weight, as safetensors in float32",
    )
    add_json_flag(out)
    return parser
