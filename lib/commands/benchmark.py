"""Time forward passes of a model under a plan, against the untouched model.

    tierhints benchmark --model ./my-model --tier-hints tier_hints.json --epsilon 0.02
    tierhints benchmark --model ./my-model --budget HBM=4GiB,SSD= --precision int8

Latency, throughput, memory, bytes moved and perplexity over held-out text, and what compression
costs in KL; with ``--exact`` the speed of exact output, too. ``--mode emulated`` charges the time
of hypothetical tiers instead of moving weights.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..hints import Hints, load_hints
from .cli import Parser, add_json_flag, emit
from .flags import (
    Flags,
    add_budget_flag,
    add_device_flag,
    add_hints_flag,
    add_model_flag,
    add_precision_flags,
    check_epsilon,
    parse_device,
    planned_precision,
)
from .text_flags import add_text_flags

if TYPE_CHECKING:
    from ..tiering import EmulationSpec

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_LENGTH = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and emit; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.tier_hints is None and args.budget is None:
        raise InputError("nothing says where weights go: give --tier-hints, or --budget HBM=,SSD=")
    from ..text.held_out import sequence_length

    def choose_length(model: Any) -> int:
        config = model.config.get_text_config()
        if args.sequence_length is None:
            return min(DEFAULT_LENGTH, sequence_length(config, None))
        return sequence_length(config, args.sequence_length)

    document = run_benchmark(args, choose_length)
    from ..report import benchmark_sections

    emit(benchmark_sections(document), document, args.json)
    return 0


def run_benchmark(args: argparse.Namespace, choose_length: Callable[[Any], int]) -> dict[str, Any]:
    """Load what the flags name, measure it, and return the document; ``choose_length`` says how
    many tokens a sequence of a model has.
    """
    import torch

    from ..checkpoint.models import load_model, quiet_transformers
    from ..evaluation.benchmark import BenchmarkSettings, benchmark, prepare_model
    from ..text.held_out import read_text
    from ..text.parts import vocabulary_size
    from ..tiering.planning.budget import read_budget

    _check_numbers(args)
    check_epsilon(args)
    settings = BenchmarkSettings(
        mode=args.mode,
        budget=None if args.budget is None else read_budget(args.budget),
        precision=planned_precision(args.precision),
        epsilon=args.epsilon,
        emulation=_read_spec(args),
        baseline=args.baseline,
        look_ahead=args.look_ahead,
        dwell_ms=args.dwell_ms,
        canary_every=args.canary,
        exact=args.exact,
        num_iterations=args.num_iterations,
        warmup=args.warmup,
        batch_size=args.batch_size,
    )
    device = parse_device(args.device)
    hints = None if args.tier_hints is None else _read_hints(args.tier_hints)
    quiet_transformers(progress=sys.stderr.isatty())
    model = load_model(args.model, args.checkpoint)
    text = read_text(
        args.model,
        args.data,
        vocab_size=vocabulary_size(model),
        length=choose_length(model),
        count=args.samples,
        seed=args.seed,
    )
    hints = prepare_model(
        model,
        hints,
        device=device if settings.moves_whole else None,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
    )
    return {
        "model": args.model,
        "checkpoint": None if args.checkpoint is None else str(args.checkpoint),
        "tier_hints": None if args.tier_hints is None else str(args.tier_hints),
        "mode": args.mode,
        "budget": args.budget,
        "precision": args.precision,
        "epsilon": args.epsilon,
        "look_ahead": args.look_ahead,
        "dwell_ms": args.dwell_ms,
        "canary": args.canary,
        "spec_file": None if args.spec is None else str(args.spec),
        "batch_size": args.batch_size,
        "num_iterations": args.num_iterations,
        "warmup": args.warmup,
        "tokens_source": text.source,
        **benchmark(model, text.tokens, hints, settings, device=device),
    }


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--num-iterations", args.num_iterations, 1),
        ("--warmup", args.warmup, 0),
        ("--canary", args.canary, 1),
        ("--dwell-ms", args.dwell_ms, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"{flag} {value} is too small: give {least} or more")
    if args.canary is not None and args.epsilon is None:
        raise InputError("--canary has no effect without --epsilon: give both, or neither")
    if args.dwell_ms is not None and args.budget is None:
        raise InputError("--dwell-ms has no effect without --budget: give both, or neither")


def _read_hints(path: Path) -> Hints:
    """Load the hints; their warnings become one line each on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hints = load_hints(path)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return hints


def _read_spec(args: argparse.Namespace) -> "EmulationSpec | None":
    """Return the emulated machine, or None in real mode, where nothing is emulated."""
    from ..tiering import EmulationSpec, load_specs

    spec = EmulationSpec() if args.spec is None else load_specs(args.spec)
    if args.mode == "emulated":
        return spec
    if args.spec is not None:
        print(
            "warning: --spec has no effect with --mode real: nothing is emulated", file=sys.stderr
        )
    return None


def add_weights_flags(model: Flags) -> None:
    """Add the flags of other weights for the model, and of their dtype."""
    model.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights to load instead: .safetensors, or .pt with tensors only",
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="auto = the checkpoint's own (default: %(default)s)",
    )


def add_mode_flags(tiers: Flags, *, mode: str) -> None:
    """Add the flags of emulation and of the canary; ``mode`` is the default."""
    tiers.add_argument(
        "--mode",
        default=mode,
        choices=["emulated", "real"],
        help="charge the time of hypothetical tiers, or move the weights (default: %(default)s)",
    )
    tiers.add_argument(
        "--canary",
        type=int,
        metavar="N",
        help="with --epsilon, measure the KL again after every N timed passes, on 16 held-out "
        "sequences, and hold blocks more precisely where it is above (default: once, before)",
    )
    tiers.add_argument(
        "--exact",
        action="store_true",
        help="also write text within the --budget, exactly, by plain streaming and resident",
    )
    tiers.add_argument(
        "--look-ahead",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read a mixture's experts before they are asked for, while that pays",
    )
    tiers.add_argument(
        "--dwell-ms",
        type=int,
        metavar="MS",
        help="with --budget, run under a controller, which brings more into fast memory only after "
        "so long without pressure (default: no controller)",
    )
    tiers.add_argument(
        "--spec",
        type=Path,
        metavar="FILE",
        help="JSON of the emulated tiers and clock (default: built in)",
    )


def add_pass_flags(work: Flags) -> None:
    """Add the flags of what is timed."""
    work.add_argument(
        "--batch-size",
        type=int,
        default=4,
        help="sequences per forward pass (default: %(default)s)",
    )
    work.add_argument(
        "--num-iterations", type=int, default=20, help="timed forward passes (default: %(default)s)"
    )
    work.add_argument(
        "--warmup", type=int, default=3, help="untimed passes before them (default: %(default)s)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Time forward passes of a causal language model, its weights placed in tiers.")
    model = parser.add_argument_group("model")
    add_model_flag(model)
    add_hints_flag(model)
    add_weights_flags(model)
    add_device_flag(model)
    tiers = parser.add_argument_group("tiering")
    add_budget_flag(tiers, otherwise="the hints alone say where weights go")
    add_precision_flags(tiers)
    add_mode_flags(tiers, mode="real")
    tiers.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the untouched model too, and compare; always with --epsilon",
    )
    add_pass_flags(parser.add_argument_group("workload"))
    add_text_flags(parser, samples=64, use="", length=DEFAULT_LENGTH)
    add_json_flag(parser)
    return parser
