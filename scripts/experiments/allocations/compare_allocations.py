"""What our allocation of precisions is worth: its KL and perplexity beside those of other
allocations that take the same bytes.

    python scripts/experiments/allocations/compare_allocations.py \
        --model runs/quickstart/checkpoint --tier-hints runs/quickstart/tier_hints.json

``ours`` allocates by the hints' calibrated curves (or, if they have none, by curves that are made
here as ``tierhints calibrate`` makes them), ``oracle`` by each block's KL measured alone on
the text that the curves are calibrated on, ``magnitude`` by squared errors;
``controls.py`` says what the others do, ``lib/precision/sizes.py`` how bits are counted
 (docs/allocation.md). All are judged on a third part of the text, which neither the curves
nor the oracle have seen. Intervals (95 %) are bootstraps over its sequences.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.blocks import parameter_digest, partition_model
from lib.checkpoint.models import cast_weights, load_model, quiet_transformers
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import parse_device
from lib.commands.text_flags import add_text_flags, read_parts
from lib.evaluation.calibrate import LENGTH, calibrate_model
from lib.evaluation.oracle import measure
from lib.evaluation.predictions import Pair, list_pairs, measuring_batches
from lib.files import check_writable
from lib.hints import load_hints, match_hints
from lib.precision.plans import predicted_kl
from lib.precision.quality import Quality, bootstrap_statistic
from lib.precision.sensitivity import Curves, magnitude_curves
from lib.precision.sizes import PrecisionMap, StoredSizes, stored_sizes
from lib.text.parts import vocabulary_size
from lib.vocabulary import Precision
from scripts.experiments.allocations.allocation_arms import (
    DRAWN,
    DRAWS,
    choose_budgets,
    hint_curves,
    plan_arms,
)
from scripts.experiments.allocations.controls import log_chord

BITS = (3.0, 4.0, 5.0)
RATIOS = {
    "over log chord": "log_chord_fraction",
    "over uniform": "ours_over_uniform",
    "over oracle": "ours_over_oracle",
    "predicted over measured": "predicted_over_measured",
}
Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    device = parse_device(args.device)
    hints = load_hints(args.tier_hints)
    quiet_transformers(progress=sys.stderr.isatty())
    model: Any = load_model(args.model)
    names = [block.name for block in partition_model(model)]
    match_hints(hints, names, identify=partial(parameter_digest, model))
    cast_weights(model, torch.float32)
    sizes = stored_sizes(model)
    pairs = list_pairs(model, seed=args.seed)
    chord = replace(sizes, precisions=chord_widths(sizes, pairs))
    budgets = choose_budgets(chord, args.bits, default=BITS)
    text = read_parts(args, model)
    curves = hint_curves(hints, sizes, digest=text.digest)
    vocab_size = vocabulary_size(model)
    model.to(device)
    origin = "the hints"
    if curves is None:
        origin = "computed here: the hints have none calibrated on the other parts of this text"
        curves = calibrate_model(
            model,
            text.fisher,
            text.calibration,
            folder=args.model,
            hints=hints,
            vocab_size=vocab_size,
            seed=args.seed,
        ).curves
    if curves.keys() < sizes.num_params.keys():  # what the text doesn't exercise has none
        sizes = stored_sizes(model, names=curves)
        pairs = [pair for pair in pairs if pair[0] in curves]
        chord = replace(sizes, precisions=chord_widths(sizes, pairs))
        budgets = choose_budgets(chord, args.bits, default=BITS)
    comparison = Comparison(
        model,
        sizes,
        calibration=measuring_batches(text.calibration, vocab_size),
        judging=measuring_batches(text.judging, vocab_size),
    )
    document: Fields = {
        "model": args.model,
        "tier_hints": str(args.tier_hints),
        "text": {**text.to_json(), "judging_tokens": text.judging.numel()},
        "curves": origin,
        "draws": DRAWS,
        "seed": args.seed,
        **comparison.run(curves, pairs, budgets, seed=args.seed),
    }
    _print(document)
    emit_json(document, args.json)
    return 0


def chord_widths(sizes: StoredSizes, pairs: Sequence[Pair]) -> tuple[Precision, ...]:
    """Return the widths that lie on the log chord: one that holds the weights exactly has a KL of 0
    and no logarithm.
    """
    lossy = {precision for _, precision in pairs}
    return tuple(precision for precision in sizes.precisions if precision in lossy)


class Comparison:
    """All allocations of one model, made from one part of a text and judged on another."""

    def __init__(
        self,
        model: Any,
        sizes: StoredSizes,
        *,
        calibration: Sequence[Tensor],
        judging: Sequence[Tensor],
    ) -> None:
        self._model, self._sizes = model, sizes
        self._calibration, self._judging = calibration, judging

    def run(
        self, curves: Curves, pairs: Sequence[Pair], budgets: Sequence[float], *, seed: int
    ) -> Fields:
        """Return the document's figures: of uniform widths, and of all arms at each budget."""
        sizes = self._sizes
        chord = chord_widths(sizes, pairs)
        widths = [sizes.uniform(precision) for precision in chord]
        alone = measure(self._model, self._calibration, [{block: p} for block, p in pairs])
        oracle: dict[str, dict[Precision, float]] = {
            block: dict.fromkeys(sizes.precisions, 0.0) for block in sizes.num_params
        }
        for (block, precision), quality in zip(pairs, alone, strict=True):
            oracle[block][precision] = quality.kl_nats
        arms = {
            bits: plan_arms(
                sizes,
                {"ours": curves, "oracle": oracle, "magnitude": magnitude_curves(self._model)},
                bits=bits,
                seed=seed,
            )
            for bits in budgets
        }
        flat = [plan for plans in arms.values() for drawn in plans.values() for plan in drawn]
        measured = iter(measure(self._model, self._judging, [*widths, *flat]))
        uniform = {precision: next(measured) for precision in chord}
        return {
            "reference_perplexity": uniform[chord[0]].reference_perplexity,
            "num_weights": sizes.num_weights,
            "uniform_widths": {
                str(precision): {
                    "bits": sizes.bits_of(sizes.uniform(precision)),
                    "kl": quality.kl_nats,
                    "ppl": quality.perplexity,
                }
                for precision, quality in uniform.items()
            },
            "bits": {
                f"{float(bits)}": _compare(
                    sizes,
                    bits,
                    plans,
                    {arm: [next(measured) for _ in drawn] for arm, drawn in plans.items()},
                    curves=curves,
                    uniform=uniform,
                )
                | {"model_bits": self._model_bits(bits)}
                for bits, plans in arms.items()
            },
        }

    def _model_bits(self, bits: float) -> float:
        """Return the bits per weight of the whole model at a budget."""
        total = sum(block.num_params for block in partition_model(self._model))
        return (self._sizes.budget(bits) + self._sizes.other_bytes) * 8 / total


def _compare(
    sizes: StoredSizes,
    bits: float,
    plans: Mapping[str, Sequence[PrecisionMap]],
    qualities: Mapping[str, Sequence[Quality]],
    *,
    curves: Curves,
    uniform: Mapping[Precision, Quality],
) -> Fields:
    """Return one budget's figures, with intervals of the ratios over the sequences."""
    kl = {arm: _mean([q.kl_nats for q in drawn]) for arm, drawn in qualities.items()}
    (ours,), (quality,) = plans["ours"], qualities["ours"]
    predicted = predicted_kl(curves, ours)
    costs = [sizes.bytes_of(sizes.uniform(precision)) for precision in uniform]

    def chord(widths_kl: Sequence[float]) -> float:
        return log_chord(zip(costs, widths_kl, strict=True), sizes.budget(bits))

    chord_kl = chord([q.kl_nats for q in uniform.values()])
    own = list(quality.kl_per_sequence)
    by_arm = {
        arm: np.mean([q.kl_per_sequence for q in drawn], axis=0).tolist()
        for arm, drawn in qualities.items()
    }
    widths = [list(q.kl_per_sequence) for q in uniform.values()]
    return {
        "kl": kl,
        "kl_sd": {arm: statistics.stdev([q.kl_nats for q in qualities[arm]]) for arm in DRAWN},
        "kl_interval": {
            arm: list(drawn[0].kl_interval or ())
            for arm, drawn in qualities.items()
            if len(drawn) == 1
        },
        "ppl": {arm: _mean([q.perplexity for q in drawn]) for arm, drawn in qualities.items()},
        "log_chord_kl": chord_kl,
        "log_chord_fraction": kl["ours"] / chord_kl,
        "ours_over_uniform": kl["ours"] / kl["uniform"],
        "ours_over_oracle": kl["ours"] / kl["oracle"],
        "predicted_kl": predicted,
        "predicted_over_measured": predicted / quality.kl_nats,
        "interval": {
            "log_chord_fraction": bootstrap_statistic(
                [own, *widths], lambda means: means[0] / chord(means[1:].tolist())
            ),
            "ours_over_uniform": bootstrap_statistic([own, by_arm["uniform"]], _ratio),
            "ours_over_oracle": bootstrap_statistic([own, by_arm["oracle"]], _ratio),
            "predicted_over_measured": bootstrap_statistic(
                [own], lambda means: predicted / float(means[0])
            ),
        },
        "used_bits": {
            arm: _mean([sizes.bits_of(plan) for plan in drawn]) for arm, drawn in plans.items()
        },
        "plan": {block: str(precision) for block, precision in ours.items()},
    }


def _ratio(means: NDArray[np.float64]) -> float:
    return float(means[0] / means[1])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _print(document: Fields) -> None:
    text = document["text"]
    print(
        f"KL of {text['judging_sequences']} unseen sequences of {text['sequence_length']} tokens: "
        f"{text['source']}; curves: {document['curves']}; perplexity of the full model "
        f"{document['reference_perplexity']:.2f}\n"
    )
    for width, row in document["uniform_widths"].items():
        print(f"all {width:>5}  {row['bits']:7.3f} bits  KL {row['kl']:.3e}  ppl {row['ppl']:.2f}")
    for bits, row in document["bits"].items():
        print(f"\n{bits} bits per weight ({row['model_bits']:.2f} of the whole model)")
        for arm in sorted(row["kl"], key=row["kl"].__getitem__):
            spread = f" sd {row['kl_sd'][arm]:.1e}" if arm in row["kl_sd"] else ""
            print(
                f"  {arm:>10}  KL {row['kl'][arm]:.3e}{spread:<11}  ppl {row['ppl'][arm]:8.2f}  "
                f"{row['used_bits'][arm]:.3f} bits used"
            )
        shown = []
        for name, key in RATIOS.items():
            low, high = row["interval"][key]
            shown.append(f"{name} {row[key]:.2f} ({low:.2f} to {high:.2f})")
        print(f"  ours: {', '.join(shown)}")
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare our allocation of precisions with others of the same bytes.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    what = parser.add_argument_group("what is compared")
    what.add_argument("--model", required=True, help="Hub id or folder of a causal language model")
    what.add_argument(
        "--tier-hints", required=True, type=Path, metavar="FILE", help="its tier_hints.json"
    )
    what.add_argument(
        "--bits",
        type=float,
        nargs="+",
        metavar="BITS",
        help=f"bits per weight of the budgets (default: those of {' '.join(map(str, BITS))} "
        "that lie within the model's uniform widths)",
    )
    what.add_argument("--device", default="auto", help=f"auto, cpu, cuda or cuda:N {default}")
    add_text_flags(parser, samples=192, use=", the three parts together", length=LENGTH)
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
