"""What our allocation of precisions is worth: its KL and perplexity beside those of other
allocations that take the same bytes.

    python scripts/compare_allocations.py --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json

``ours`` allocates by the hints' calibrated curves (or, if they have none, by curves that are made
here as ``scripts/calibrate_hints.py`` makes them), ``oracle`` by each block's KL measured alone on
the very text that all are judged on, ``magnitude`` by squared errors; ``lib/precision/controls.py``
says what the others do, ``lib/precision/sizes.py`` how bits are counted (docs/allocation.md).
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.blocks import parameter_digest, partition_model
from lib.errors import InputError
from lib.files import check_writable
from lib.hints import Precision, load_hints, match_hints
from lib.precision.controls import log_chord
from lib.precision.quality import Quality
from lib.precision.sensitivity import Curves, magnitude_curves
from lib.precision.sizes import Plan, StoredSizes, stored_sizes
from scripts.allocation_arms import (
    DRAWN,
    DRAWS,
    check_budgets,
    compute_curves,
    hint_curves,
    plan_arms,
)
from scripts.cli import emit_json, run_main
from scripts.inputs import (
    cast_weights,
    load_model,
    parse_device,
    quiet_transformers,
    read_text,
    sequence_length,
)
from scripts.oracle import measure
from scripts.predictions import (
    list_pairs,
    measuring_batches,
    split_text,
)

BITS = (3.0, 4.0, 5.0)
Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.samples < 2:
        raise InputError(f"--samples {args.samples} must be at least 2")
    check_writable(args.json)
    device = parse_device(args.device)
    hints = load_hints(args.tier_hints)
    quiet_transformers(progress=sys.stderr.isatty())
    model: Any = load_model(args.model)
    names = [block.name for block in partition_model(model)]
    match_hints(hints, names, parameter_digest=parameter_digest(model))
    cast_weights(model, torch.float32)
    sizes = stored_sizes(model)
    budgets = args.bits or BITS
    check_budgets(sizes, budgets)
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
    first, second = split_text(text.tokens)
    model.to(device)
    curves = hint_curves(hints, sizes)
    origin = "the hints"
    if curves is None:
        origin = "computed here: the hints have none that were calibrated"
        curves = compute_curves(
            model, first, vocab_size, folder=args.model, hints=hints, seed=args.seed
        )
    comparison = Comparison(model, sizes, measuring_batches(second, vocab_size))
    document: Fields = {
        "model": args.model,
        "tier_hints": str(args.tier_hints),
        "text": {
            "source": text.source,
            "sequence_length": length,
            "sequences": len(second),
            "tokens": second.numel(),
        },
        "curves": origin,
        "draws": DRAWS,
        "seed": args.seed,
        **comparison.run(curves, budgets, seed=args.seed),
    }
    _print(document)
    emit_json(document, args.json)
    return 0


class Comparison:
    """All allocations of one model, measured on one text."""

    def __init__(self, model: Any, sizes: StoredSizes, batches: Sequence[Tensor]) -> None:
        self._model, self._sizes, self._batches = model, sizes, batches

    def run(self, curves: Curves, budgets: Sequence[float], *, seed: int) -> Fields:
        """Return the document's figures: of uniform widths, and of all arms at each budget."""
        sizes = self._sizes
        widths = [sizes.uniform(precision) for precision in sizes.precisions]
        pairs = list_pairs(self._model, seed=seed)
        alone = measure(self._model, self._batches, [{block: p} for block, p in pairs])
        oracle: dict[str, dict[Precision, float]] = {block: {} for block in sizes.num_params}
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
        measured = iter(measure(self._model, self._batches, [*widths, *flat]))
        uniform = {precision: next(measured) for precision in sizes.precisions}
        chord = [
            (sizes.bytes_of(plan), quality.kl_nats)
            for plan, quality in zip(widths, uniform.values(), strict=True)
        ]
        return {
            "reference_perplexity": alone[0].reference_perplexity,
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
                f"{float(bits)}": self._compare(
                    bits,
                    plans,
                    {arm: [next(measured) for _ in drawn] for arm, drawn in plans.items()},
                    curves=curves,
                    chord_kl=log_chord(chord, sizes.budget(bits)),
                )
                for bits, plans in arms.items()
            },
        }

    def _compare(
        self,
        bits: float,
        plans: Mapping[str, Sequence[Plan]],
        qualities: Mapping[str, Sequence[Quality]],
        *,
        curves: Curves,
        chord_kl: float,
    ) -> Fields:
        kl = {arm: _mean([q.kl_nats for q in drawn]) for arm, drawn in qualities.items()}
        (ours,), (quality,) = plans["ours"], qualities["ours"]
        predicted = sum(curves[block][precision] for block, precision in ours.items())
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
            "used_bits": {
                arm: _mean([self._sizes.bits_of(plan) for plan in drawn])
                for arm, drawn in plans.items()
            },
            "model_bits": (self._sizes.budget(bits) + self._sizes.other_bytes)
            * 8
            / sum(block.num_params for block in partition_model(self._model)),
            "plan": {block: str(precision) for block, precision in ours.items()},
        }


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _print(document: Fields) -> None:
    text = document["text"]
    print(
        f"KL of {text['sequences']} sequences of {text['sequence_length']} tokens: {text['source']}"
        f"; curves: {document['curves']}; perplexity of the full model "
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
        print(
            f"  ours: {row['log_chord_fraction']:.2f} of the log chord, "
            f"{row['ours_over_uniform']:.2f} of uniform, {row['ours_over_oracle']:.2f} of the "
            f"oracle's; predicted {row['predicted_over_measured']:.2f} of measured"
        )
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
        help=f"bits per weight of the budgets (default: {' '.join(map(str, BITS))})",
    )
    what.add_argument(
        "--data",
        metavar="TEXT",
        help="text to measure on: a file, a folder or a glob (default: the model folder's held-out "
        "text, else the standard library's)",
    )
    what.add_argument(
        "--samples",
        type=int,
        default=128,
        metavar="N",
        help=f"sequences; KL is measured on every other one {default}",
    )
    what.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="tokens per sequence (default: the model's context, at most 512)",
    )
    what.add_argument(
        "--seed", type=int, default=0, help=f"of text, labels and random arms {default}"
    )
    what.add_argument("--device", default="auto", help=f"auto, cpu, cuda or cuda:N {default}")
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
