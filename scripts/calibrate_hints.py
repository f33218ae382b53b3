"""Predict what storing each block at fewer bits costs, check that against measurement, and write
both into tier_hints.json.

    python scripts/calibrate_hints.py --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json

The text is split: on every other sequence Fisher information is estimated, on the rest the true KL
of random probes (pairs of block and precision) is measured. Each block gets its calibrated ``kl``,
the file the scale, the error band and the safety factor (docs/precision.md). ``--oracle`` measures
every pair, and all blocks together, and says how well each signal ranks them.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lib.blocks import parameter_digest, partition_model
from lib.errors import InputError
from lib.files import check_writable
from lib.hints import Hints, load_hints, match_hints, save_hints
from lib.precision.calibration import PROBES, Calibration, calibrate
from lib.precision.quality import Quality
from lib.precision.sensitivity import Curves, find_violations, monotone
from scripts.cli import emit_json, run_main
from scripts.inputs import (
    cast_weights,
    load_model,
    parse_device,
    quiet_transformers,
    read_text,
    sequence_length,
)
from scripts.oracle import check_additivity, measure, progress_bar, rank_signals
from scripts.predictions import (
    Pair,
    Predictions,
    calibrate_signals,
    list_pairs,
    measuring_batches,
    predict,
    split_text,
    upper_curves,
)

Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _check_numbers(args)
    output = args.output or args.tier_hints
    check_writable(output)
    check_writable(args.json)
    device = parse_device(args.device)
    hints = load_hints(args.tier_hints)
    quiet_transformers(progress=sys.stderr.isatty())
    model: Any = load_model(args.model)
    _check_hints(hints, model)
    cast_weights(model, torch.float32)
    length = sequence_length(model.config, args.sequence_length)
    vocab_size = model.config.get_text_config().vocab_size
    text = read_text(
        args.model,
        args.data,
        vocab_size=vocab_size,
        length=length,
        count=args.samples,
        seed=args.seed,
    )
    if len(text.tokens) < 2:
        raise InputError(f"{text.source} has one sequence of {length} tokens: two parts need more")
    fisher_text, kl_text = split_text(text.tokens)
    model.to(device)
    begin = time.perf_counter()
    steps = args.draws + (len(fisher_text) if args.oracle else 0)
    with progress_bar(steps, "gradients") as bar:
        predictions = predict(
            model,
            fisher_text,
            folder=args.model,
            hints=hints,
            draws=args.draws,
            seed=args.seed,
            empirical=args.oracle,
            progress=bar.update,
        )
    pairs = list_pairs(model, seed=args.seed)
    if not args.oracle:
        pairs = pairs[:PROBES]
    batches = measuring_batches(kl_text, vocab_size)
    measured = measure(model, batches, [{block: precision} for block, precision in pairs])
    kl = [quality.kl_nats for quality in measured]
    calibrations = calibrate_signals(predictions, pairs, kl)
    upper = upper_curves(predictions, calibrations)
    final = calibrate([upper[block][precision] for block, precision in pairs], kl)
    violations = _violations(predictions)
    calibrated = add_curves(hints, upper, final, calibrations)
    document: Fields = {
        "model": args.model,
        "tier_hints": str(output),
        "text": {
            "source": text.source,
            "sequence_length": length,
            "fisher_sequences": len(fisher_text),
            "kl_sequences": len(kl_text),
        },
        "draws": args.draws,
        "seed": args.seed,
        "missing": dict(predictions.missing),
        "calibration": {signal: value.to_json() for signal, value in calibrations.items()},
        "quality": dict(calibrated.quality),
        "violations": violations,
        "probes": [
            _row(pair, quality, predictions, upper[pair[0]][pair[1]] * final.scale)
            for pair, quality in zip(pairs, measured, strict=True)
        ],
    }
    if args.oracle:
        document |= rank_signals(predictions, pairs, kl)
        singles = dict(zip(pairs, kl, strict=True))
        document["additivity"] = check_additivity(model, batches, upper, final, singles)
    document["seconds"] = round(time.perf_counter() - begin, 1)
    save_hints(calibrated, output)
    _print(document)
    emit_json(document, args.json)
    return 0


def add_curves(
    hints: Hints, upper: Curves, final: Calibration, calibrations: Mapping[str, Calibration]
) -> Hints:
    """Return the hints with every block's curve and what is known of their accuracy."""
    blocks = {
        name: replace(
            hint,
            kl=monotone({p: value * final.scale for p, value in upper[name].items()}),
        )
        for name, hint in hints.blocks.items()
    }
    quality = {
        **hints.quality,
        "calibrated": True,
        "signal": "larger of fisher_true and directional",
        "scale": {signal: value.scale for signal, value in calibrations.items()},
        "band": list(final.band),
        "conformal_factor": final.conformal_factor,
        "coverage": final.coverage,
        "fit_probes": final.fit_probes,
        "conformal_probes": final.conformal_probes,
    }
    return replace(hints, blocks=blocks, quality=quality)


def _check_hints(hints: Hints, model: Any) -> None:
    names = [block.name for block in partition_model(model)]
    if hints.model is None:
        raise InputError("flat hints have no place for a KL curve: make full ones for this model")
    match_hints(hints, names, parameter_digest=parameter_digest(model))
    if unknown := sorted(set(names) - set(hints.blocks)):
        raise InputError(f"block {unknown[0]!r} has no hint of its own: make the hints anew")


def _violations(predictions: Predictions) -> list[Fields]:
    """Return the steps of both estimates at which fewer bits seem to cost less."""
    magnitude, true = predictions.curves["magnitude"], predictions.true
    found = []
    for signal, curves, stderr in (
        ("fisher_true", true.diagonal, true.diagonal_stderr),
        ("directional", true.directional, true.directional_stderr),
    ):
        for step in find_violations(curves, errors=magnitude, stderr=stderr):
            found.append(
                {
                    "signal": signal,
                    "block": step.block,
                    "finer": str(step.finer),
                    "coarser": str(step.coarser),
                    "reason": step.reason,
                }
            )
    return found


def _row(pair: Pair, quality: Quality, predictions: Predictions, predicted: float) -> Fields:
    block, precision = pair
    return {
        "block": block,
        "precision": str(precision),
        "kl": quality.kl_nats,
        "kl_interval": None if quality.kl_interval is None else [*quality.kl_interval],
        "predicted": predicted,
        **{
            signal: curves[block][precision]
            for signal, curves in predictions.curves.items()
            if block in curves
        },
    }


def _print(document: Fields) -> None:
    text, quality = document["text"], document["quality"]
    print(
        f"Fisher information on {text['fisher_sequences']} and KL on {text['kl_sequences']} other "
        f"sequences of {text['sequence_length']} tokens: {text['source']}"
    )
    columns = ["signal", "scale", "10 %", "90 %"]
    columns += ["rho", "worst rho within a precision"] if "spearman" in document else []
    print("\n" + "  ".join(f"{column:>16}" for column in columns))
    for signal in document.get("spearman") or document["calibration"]:
        fitted = document["calibration"].get(signal)
        cells = ["", "", ""] if fitted is None else [fitted["scale"], *fitted["band"]]
        if "spearman" in document and document["spearman"][signal] is not None:
            within = [row[signal] for row in document["within_precision"].values()]
            cells += [document["spearman"][signal], min(within)]
        shown = [f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells]
        print("  ".join(f"{cell:>16}" for cell in [signal, *shown]))
    for row in document.get("additivity", []):
        print(
            f"{row['plan']:>22}: KL {row['joint_kl']:.3g}, {row['joint_over_sum']:.2f} of the sum "
            f"of singles; predicted {row['predicted']:.3g}; perplexity {row['perplexity']:.2f}"
        )
    for signal, reason in document["missing"].items():
        print(f"no {signal}: {reason}")
    for step in document["violations"]:
        print(
            f"{step['signal']} of {step['block']}: {step['coarser']} below {step['finer']}, "
            f"{step['reason']}"
        )
    print(
        f"\nA block's KL is at most {quality['conformal_factor']:.2f} of what the file says, in "
        f"{quality['coverage']:.0%} of cases ({quality['conformal_probes']} probes).\n"
    )


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, least in (("samples", 2), ("draws", 8), ("seed", 0)):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag} {getattr(args, flag)} must be at least {least}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Predict each block's KL per precision, calibrate it, write it to the hints.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", required=True, help="folder or hub id of a causal LM checkpoint")
    what.add_argument(
        "--tier-hints", required=True, type=Path, metavar="FILE", help="hints of this model"
    )
    what.add_argument(
        "--data",
        metavar="TEXT",
        help="UTF-8 text: a file, a folder or a glob (default: the checkpoint's held-out text)",
    )
    what.add_argument(
        "--samples",
        type=int,
        default=128,
        metavar="N",
        help=f"sequences of text, at most, both halves together {default}",
    )
    what.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="tokens per sequence (default: the model's context, at most 512)",
    )
    what.add_argument(
        "--draws",
        type=int,
        default=256,
        metavar="N",
        help=f"gradients with sampled labels; the directional error is sqrt(2/N) {default}",
    )
    what.add_argument(
        "--oracle",
        action="store_true",
        help="measure every block at every precision, and all together",
    )
    what.add_argument(
        "--seed", type=int, default=0, help=f"of text, labels and choice of probes {default}"
    )
    what.add_argument("--device", default="auto", help=f"auto, cpu, cuda or cuda:N {default}")
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--output", type=Path, metavar="FILE", help="the hints (default: the file they came from)"
    )
    out.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
