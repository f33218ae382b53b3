"""Predict what storing each block at fewer bits costs, check that against measurement, and write
both into tier_hints.json.

    tierhints calibrate --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json

The text is cut in three, sequences taking turns. On the first part Fisher information is estimated;
on the second the true KL of random probes is measured: pairs of block and precision, and whole
plans. The third is left for judging. Each block gets its calibrated ``kl``, the file the scale, the
error band, the safety factor, and what kernels cost beyond the weights' error (docs/precision.md).
``--oracle`` measures every pair, says how well each signal ranks them, and judges whole plans.

Interrupted, the same command goes on: steps are kept in OUTPUT.calibration until the hints are
written.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.models import load_model, quiet_transformers
from ..evaluation.calibrate import DRAWS, LENGTH, CalibratedModel, Probe
from ..evaluation.calibration import calibrate_on_parts, check_hints
from ..evaluation.oracle import check_additivity, rank_signals
from ..evaluation.predictions import Pair, Predictions, measuring_batches
from ..files import check_writable
from ..hints import load_hints, save_hints
from ..precision.sensitivity import find_violations
from ..precision.tolerance import LARGEST_TRUSTED_FACTOR
from ..text.parts import vocabulary_size
from .cli import Parser, add_json_flag, emit
from .flags import (
    add_device_flag,
    add_hints_flag,
    add_model_flag,
    parse_device,
    whole_number,
)
from .text_flags import add_text_flags, read_parts

Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate the hints; returns the exit code."""
    args = _parser().parse_args(argv)
    output = args.output or args.tier_hints
    check_writable(output)
    device = parse_device(args.device)
    hints = load_hints(args.tier_hints)
    quiet_transformers(progress=sys.stderr.isatty())
    model: Any = load_model(args.model)
    check_hints(hints, model)
    text = read_parts(args, model)
    model.to(device)
    begin = time.perf_counter()
    calibrated, found = calibrate_on_parts(
        model,
        hints,
        text,
        folder=args.model,
        draws=args.draws,
        seed=args.seed,
        oracle=args.oracle,
        every_sequence=args.every_sequence,
        journal=output.with_name(f"{output.name}.calibration"),
    )
    document: Fields = {
        "model": args.model,
        "tier_hints": str(output),
        "text": text.to_json(),
        "draws": args.draws,
        "seed": args.seed,
        "missing": dict(found.predictions.missing),
        "calibration": {signal: value.to_json() for signal, value in found.calibrations.items()},
        "quality": dict(calibrated.quality),
        "plan_ratios": list(found.plan_ratios),
        "plan_sequences": list(found.plan_sequences),
        "violations": _violations(found.predictions),
        "probes": [
            _row(pair, probe, found)
            for pair, probe in zip(found.pairs, found.measured, strict=True)
        ],
    }
    if args.oracle:
        kl = [probe.kl_nats for probe in found.measured]
        vocab_size = vocabulary_size(model)
        document |= rank_signals(found.predictions, found.pairs, kl)
        document["additivity"] = check_additivity(
            model,
            found.curves,
            dict(zip(found.pairs, kl, strict=True)),
            batches=measuring_batches(text.calibration, vocab_size),
            judging=measuring_batches(text.judging, vocab_size),
        )
    document["seconds"] = round(time.perf_counter() - begin, 1)
    save_hints(calibrated, output)
    emit(_table(document), document, args.json)
    return 0


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


def _row(pair: Pair, probe: Probe, found: CalibratedModel) -> Fields:
    block, precision = pair
    return {
        "block": block,
        "precision": str(precision),
        "kl": probe.kl_nats,
        "kl_limit": probe.kl_limit,
        "kl_interval": None if probe.kl_interval is None else [*probe.kl_interval],
        "sequences": probe.sequences,
        "predicted": found.curves[block][precision],
        **{
            signal: curves[block][precision]
            for signal, curves in found.predictions.curves.items()
            if block in curves
        },
    }


def _table(document: Fields) -> str:
    text, quality = document["text"], document["quality"]
    lines: list[str] = []
    lines.append(
        f"Fisher information on {text['fisher_sequences']}, KL on {text['calibration_sequences']}, "
        f"{text['judging_sequences']} left to judge on, of {text['sequence_length']} tokens each: "
        f"{text['source']}"
    )
    columns = ["signal", "scale", "10 %", "90 %"]
    columns += ["rho", "worst rho within a precision"] if "spearman" in document else []
    lines.append("\n" + "  ".join(f"{column:>16}" for column in columns))
    for signal in document.get("spearman") or document["calibration"]:
        fitted = document["calibration"].get(signal)
        cells = ["", "", ""] if fitted is None else [fitted["scale"], *fitted["band"]]
        if "spearman" in document and document["spearman"][signal] is not None:
            within = [row[signal] for row in document["within_precision"].values()]
            cells += [document["spearman"][signal], min(within)]
        shown = [f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells]
        lines.append("  ".join(f"{cell:>16}" for cell in [signal, *shown]))
    for row in document.get("additivity", []):
        lines.append(
            f"{row['plan']:>22}: KL {row['joint_kl']:.3g}, {row['joint_over_sum']:.2f} of the sum "
            f"of singles; on unseen text {row['judged_kl']:.3g}, predicted {row['predicted']:.3g} "
            f"({row['predicted_over_judged']:.2f}); perplexity {row['perplexity']:.2f}"
        )
    for signal, reason in document["missing"].items():
        lines.append(f"no {signal}: {reason}")
    for step in document["violations"]:
        lines.append(
            f"{step['signal']} of {step['block']}: {step['coarser']} below {step['finer']}, "
            f"{step['reason']}"
        )
    if quality["unexercised"]:
        lines.append(
            f"not exercised by this text, so they stay as they are under an epsilon: "
            f"{', '.join(quality['unexercised'])}"
        )
    lines.append(f"\n{_guarantee(quality)}")
    if not quality["trustworthy"]:
        lines.append(
            "WARNING: predictions say little on this model: bounds are "
            f"{quality['conformal_factor']:.3g} times what is predicted, where "
            f"{LARGEST_TRUSTED_FACTOR:g} is a lot. More text and draws may help (--samples, "
            "--draws); or measure what is placed: attach(..., measure=)."
        )
    lines.append(
        f"Kernels cost up to {quality['kernels']['nats']:.2g} nats more "
        f"({quality['kernels']['name']}).\n"
    )
    return "\n".join(lines)


def _guarantee(quality: Fields) -> str:
    """Say what the safety factor is worth."""
    pairs = (
        f"all {quality['conformal_probes']} pairs of block and precision, measured one by one"
        if quality["exhaustive"]
        else f"95 % of pairs of block and precision ({quality['conformal_probes']} random ones)"
    )
    race = quality["race"]
    raced = (
        f" Of {race['sequences']} sequences pairs were measured on "
        f"{race['mean_sequences_per_pair']:.1f} and plans on "
        f"{race['mean_sequences_per_plan']:.1f} on average."
        if race
        else ""
    )
    return (
        f"Measured KL is at most {quality['conformal_factor']:.2f} times what the file says: for "
        f"{pairs} {quality['pair_factor']:.2f} times, for 95 % of whole plans ({quality['plans']} "
        f"random ones) {quality['plan_factor']:.2f} times, with 95 % confidence.{raced}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Predict each block's KL per precision, calibrate it, write it to the hints.")
    default = "(default: %(default)s)"
    what = parser.add_argument_group("what is measured")
    add_model_flag(what)
    add_hints_flag(what, required=True)
    what.add_argument(
        "--draws",
        type=whole_number(8),
        default=DRAWS,
        metavar="N",
        help=f"gradients with sampled labels; the directional error is sqrt(2/N) {default}",
    )
    what.add_argument(
        "--every-sequence",
        action="store_true",
        help="measure every probe and plan on every sequence: the slow way to the same factor",
    )
    what.add_argument(
        "--oracle",
        action="store_true",
        help="measure every block at every precision, and all together",
    )
    add_device_flag(what)
    add_text_flags(parser, samples=192, use=", the three parts together", length=LENGTH)
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--output", type=Path, metavar="FILE", help="the hints (default: the file they came from)"
    )
    add_json_flag(out)
    return parser
