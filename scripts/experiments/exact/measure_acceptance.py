"""Measure what is accepted of drafts, by width and by kind of text, uniform and mixed.

    python scripts/experiments/exact/measure_acceptance.py --name smollm2 --model runs/demo/model \
        --tier-hints hints/smollm2-135m-instruct.tier_hints.json --json acceptance.json \
        --plot acceptance.png

Each kind of text (``prompts.py``) is continued by the full model, greedily and sampled at
temperature 1; at each new token a copy says what comes next (``lib.evaluation.acceptance``). Copies
are uniform, from 8 to 2 bits, and mixed: of the same bytes as a uniform one, each block with the
precision that the hints' KL curves give it. ``--other-weights``: the hints are of the model before
its weights changed, such as by fine-tuning.

Several models, one after another, may share a JSON file: what is there of others stays, and all of
them are drawn. stdout ends with the document:

    {"models": {NAME: {"copies": {COPY: {"bits", "predicted", "kinds": {KIND: {"greedy", "sampled",
                                                                               "kl_nats"}}}}}}}
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.load import load
from lib.checkpoint.models import quiet_transformers
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import add_model_flag, whole_number
from lib.errors import InputError
from lib.evaluation.acceptance import OwnText, predict_draft
from lib.files import check_writable, parse_json, write_json
from lib.hints import Hints, load_hints
from lib.precision.allocate import allocate_precisions
from lib.precision.sizes import PrecisionMap, StoredSizes, stored_sizes
from lib.progress import show_progress
from lib.progressive.division import WIDTHS
from lib.report.acceptance_plots import plot_acceptance
from lib.text.held_out import load_tokenizer
from lib.tiering import attach
from lib.tiering.planning.needs import PrecisionChoice
from lib.vocabulary import Precision
from scripts.experiments.exact.prompts import KINDS, read_prompts

MIXED = (Precision.INT6, Precision.INT5, Precision.INT4, Precision.INT3)
"""The uniform widths whose bytes a mixed copy gets."""
_CHATS = 240
"""So many are read, of which those of one length are used."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    quiet_transformers(progress=False)
    hints = load_hints(args.tier_hints)
    if args.other_weights:
        hints = replace(hints, model=None)
    tokenizer = load_tokenizer(args.model)
    model: Any = load(args.model)
    whole: dict[str, Any] = {"budget": {"HBM": None}, "weights": args.model}
    with attach(model, **whole):
        texts = {
            kind: OwnText(
                model,
                one_length(tokenizer, kind, args.samples, args.prompt_tokens, seed=args.seed),
                new_tokens=args.new_tokens,
                seed=args.seed,
            )
            for kind in KINDS
        }
    sizes = stored_sizes(model, WIDTHS, names=curve_names(hints))
    copies: dict[str, Any] = {}
    drafts = choose_copies(sizes, hints)
    for name, (choice, precisions) in show_progress(drafts.items(), "copies", total=len(drafts)):
        with attach(model, **whole, precision=choice):
            found = {kind: text.compare() for kind, text in texts.items()}
        copies[name] = {
            "bits": sizes.bits_of(precisions),
            "predicted": predict_draft(model, args.model, hints, choice),
            "kinds": {
                kind: {"greedy": each.greedy, "sampled": each.sampled, "kl_nats": each.kl_nats}
                for kind, each in found.items()
            },
        }
        print(row_text(name, copies[name]), flush=True)
    document: dict[str, Any] = {"models": {}}
    if args.json is not None and args.json.exists():
        document = parse_json(args.json.read_text("utf-8"))
    document["models"][args.name] = {
        "model": args.model,
        "tier_hints": str(args.tier_hints),
        "hints_of_other_weights": args.other_weights,
        "samples_of_each_kind": args.samples,
        "new_tokens": args.new_tokens,
        "copies": copies,
    }
    if args.plot is not None:
        plot_acceptance(document, args.plot)
    if args.json is not None:
        write_json(document, args.json)
    emit_json(document)
    return 0


def one_length(tokenizer: Any, kind: str, count: int, tokens: int, *, seed: int) -> Tensor:
    """Return prompts (count, T) without padding: of chats those of the commonest length."""
    asked = max(count, _CHATS) if kind == "chat" else count
    prompts = read_prompts(tokenizer, kind, count=asked, tokens=tokens, seed=seed)
    length, _ = Counter(map(len, prompts)).most_common(1)[0]
    chosen = [each for each in prompts if len(each) == length][:count]
    if len(chosen) < count:
        raise InputError(
            f"only {len(chosen)} chats are of one length: give --samples {len(chosen)}"
        )
    return torch.tensor(chosen)


def curve_names(hints: Hints) -> list[str]:
    """Return the blocks whose KL is predicted at all widths; raises InputError for none."""
    names = [name for name, hint in hints.blocks.items() if set(WIDTHS) <= hint.kl.keys()]
    if not names:
        raise InputError(
            "the hints predict no KL of 8 to 2 bits: calibrate them first (tierhints calibrate)"
        )
    return names


def choose_copies(
    sizes: StoredSizes, hints: Hints
) -> dict[str, tuple[PrecisionChoice, PrecisionMap]]:
    """Return the copies to measure, uniform ones and mixed ones of the same bytes: what to attach
    with, and the width of each block that has a choice.
    """
    copies: dict[str, tuple[PrecisionChoice, PrecisionMap]] = {
        str(width): (width, sizes.uniform(width)) for width in WIDTHS
    }
    options = sizes.options({name: hints.blocks[name].kl for name in sizes.num_params})
    for width in MIXED:
        budget = sizes.bytes_of(sizes.uniform(width))
        precisions = allocate_precisions(options, cost_budget=budget).precisions
        copies[f"mixed, bytes of {width}"] = precisions, precisions
    return copies


def row_text(name: str, copy: dict[str, Any]) -> str:
    predicted = "    -" if copy["predicted"] is None else f"{copy['predicted']:.3f}"
    cells = "  ".join(
        f"{kind} {each['greedy']:.3f} {each['sampled']:.3f} (KL {each['kl_nats']:.4f})"
        for kind, each in copy["kinds"].items()
    )
    return f"{name:20} {copy['bits']:5.2f} bits  predicted {predicted}  {cells}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure what is accepted of drafts, by width and kind of text.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    parser.add_argument("--name", required=True, help="what the document and the plot call it")
    add_model_flag(parser)
    parser.add_argument(
        "--tier-hints", required=True, type=Path, metavar="FILE", help="calibrated hints"
    )
    parser.add_argument(
        "--other-weights", action="store_true", help="the hints are of the model as it was before"
    )
    count = whole_number(2)
    parser.add_argument(
        "--samples", type=count, default=8, metavar="N", help=f"prompts of each kind {default}"
    )
    parser.add_argument("--prompt-tokens", type=count, default=32, metavar="N", help=default)
    parser.add_argument("--new-tokens", type=count, default=64, metavar="N", help=default)
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help=default)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="add this model to the document here"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all models of it: a PNG")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
