"""Check that a declared quality bound is kept: hold a model under epsilon, and measure its KL.

    python scripts/verify_epsilon.py --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json --runs 20

Every run has a seed and an epsilon of its own, evenly spread on a log scale. The model is attached
under epsilon, as a user would, and measured as it runs against the full one, on sequences that the
seed draws. Other sequences serve the joint check that the runtime makes before it lets a plan
stand. Both are text that calibration did not see: without ``--data``, held-out documents of the
standard library, less what is in the checkpoint's own held-out text. stdout gets a row per run and,
as its last line, one JSON document:

    {"held": k, "runs": n, "rows": [{"seed", "epsilon", "predicted", "bound", "measured", ...}]}
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lib.errors import InputError
from lib.files import check_writable
from lib.hints import Hints, load_hints
from lib.policy.veto import Measured
from lib.precision.floors import parse_epsilon, read_factor
from lib.tiering import attach
from scripts.cli import emit_json, run_main
from scripts.inputs import (
    load_library_text,
    load_model,
    load_tokenizer,
    parse_device,
    quiet_transformers,
    sequence_length,
)
from scripts.measure import ForwardBench
from scripts.text import find_text_files, make_sequences, read_chunks

CHECK_SEQUENCES = 16
VERDICT_SEQUENCES = 32
LENGTH = 128
BATCH_SIZE = 8

Draw = Callable[[int], Tensor]
"""Seed -> sequences (CHECK_SEQUENCES + VERDICT_SEQUENCES, length)."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    epsilons = spread(parse_epsilon(args.smallest), parse_epsilon(args.largest), args.runs)
    check_writable(args.json)
    device = parse_device(args.device)
    hints = load_hints(args.tier_hints)
    read_factor(hints.quality)
    quiet_transformers(progress=False)
    model: Any = load_model(args.model)
    model.to(device)
    draw, source = open_text(args.model, args.data, model)
    print(f"KL measured on {VERDICT_SEQUENCES} sequences per run: {source}\n")
    print(f"{'seed':>4}  {'epsilon':>9}  {'predicted':>9}  {'bound':>9}  {'measured':>9}  held in")
    rows = []
    for seed, epsilon in enumerate(tqdm(epsilons, disable=not sys.stderr.isatty(), leave=False)):
        row = verify(model, hints, epsilon, draw(seed), device=device)
        rows.append({"seed": seed, **row})
        print(row_text(rows[-1]), flush=True)
    held = sum(row["held"] for row in rows)
    print(f"\nmeasured KL within epsilon in {held} of {len(rows)} runs\n")
    emit_json({"held": held, "runs": len(rows), "text": source, "rows": rows}, args.json)
    return 0


def spread(smallest: float, largest: float, count: int) -> list[float]:
    """Return epsilons evenly spaced on a log scale."""
    if count < 1:
        raise InputError(f"--runs {count} is too few: give 1 or more")
    if smallest > largest:
        raise InputError(f"--smallest {smallest:g} is above --largest {largest:g}: swap them")
    return [float(value) for value in np.geomspace(smallest, largest, count)]


def open_text(folder: str, data: str | None, model: Any) -> tuple[Draw, str]:
    """Return what draws sequences by seed, and what they are drawn from."""
    length = sequence_length(model.config, None)
    length = min(length, LENGTH)
    count = CHECK_SEQUENCES + VERDICT_SEQUENCES
    if data is not None:
        files, tokenizer = find_text_files(data), load_tokenizer(folder)
        return lambda seed: make_sequences(
            tokenizer, read_chunks(files, seed=seed), length=length, count=count, data=data
        ), data
    text = load_library_text(folder, length=length)
    if len(text.tokens) < count:
        raise InputError(
            f"{text.source} has {len(text.tokens)} sequences that calibration did not see, not "
            f"{count}: give --data"
        )

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return text.tokens[torch.randperm(len(text.tokens), generator=generator)[:count]]

    return draw, text.source


def verify(
    model: Any, hints: Hints, epsilon: float, tokens: Tensor, *, device: torch.device
) -> dict[str, Any]:
    """Attach the model under epsilon, measure it, and say whether it has kept the bound."""

    def bench(part: Tensor) -> ForwardBench:
        return ForwardBench(
            model, part, batch_size=BATCH_SIZE, warmup=0, device=device, progress=False
        )

    check, verdict = bench(tokens[:CHECK_SEQUENCES]), bench(tokens[CHECK_SEQUENCES:])
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / part for part in ("check", "verdict")]
        for part, folder in zip((check, verdict), folders, strict=True):
            folder.mkdir()
            part.save_reference(folder)

        def measure() -> Measured:
            quality = check.compare_reference(folders[0])
            assert quality.kl_interval is not None
            return Measured(kl_nats=quality.kl_nats, upper_nats=quality.kl_interval[1])

        with attach(
            model,
            hints,
            budget={"HBM": None, "SSD": None},  # all in fast memory, the originals beside
            epsilon=epsilon,
            measure=measure,
            device=device,
        ) as runtime:
            quality = verdict.compare_reference(folders[1])
            places = list(runtime.plan.placements.values())
            veto = runtime.veto.to_json()
    precisions = [str(place.precision) for place in places]
    return {
        "epsilon": epsilon,
        "predicted": veto["predicted_nats"],
        "bound": veto["bound_nats"],
        "measured": quality.kl_nats,
        "interval": quality.kl_interval,
        "held": quality.kl_nats <= epsilon,
        "perplexity": quality.perplexity,
        "reference_perplexity": quality.reference_perplexity,
        "bytes": sum(place.stored_bytes for place in places),
        "precisions": {name: precisions.count(name) for name in dict.fromkeys(precisions)},
        "refused": veto["rejections"],
    }


def row_text(row: dict[str, Any]) -> str:
    numbers = [row[name] for name in ("epsilon", "predicted", "bound", "measured")]
    cells = "  ".join(f"{number:9.5f}" for number in numbers)
    held = ", ".join(f"{name} {count}" for name, count in row["precisions"].items())
    return f"{row['seed']:4}  {cells}  {held}{'' if row['held'] else '   ABOVE'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Place a model under a range of quality bounds and measure whether they hold.",
        epilog="Exit codes: 0 done (whatever the result), 1 failed, 2 wrong input. The last line "
        "of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    parser.add_argument("--model", required=True, help="folder or hub id of a causal LM checkpoint")
    parser.add_argument(
        "--tier-hints", required=True, type=Path, metavar="FILE", help="its calibrated hints"
    )
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="UTF-8 text that calibration did not see: a file, a folder or a glob (default: "
        "held-out documents of the standard library)",
    )
    parser.add_argument("--runs", type=int, default=20, metavar="N", help=default)
    parser.add_argument("--smallest", default="0.001", metavar="BOUND", help=f"epsilon {default}")
    parser.add_argument("--largest", default="0.1", metavar="BOUND", help=f"epsilon {default}")
    parser.add_argument("--device", default="auto", help=f"auto, cpu, cuda or cuda:N {default}")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
