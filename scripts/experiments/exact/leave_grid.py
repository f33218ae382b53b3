"""Fine-tune a model for a short while, so that its weights leave the grid they were rounded to.

    python scripts/experiments/exact/leave_grid.py --model runs/demo/model --output runs/exact/tuned

SmolLM2's weights in its package lie on a 4-bit grid. Does that flatter a draft? A few steps of
AdamW on prose and code (``prompts.py``) move every weight off it. stdout ends with one JSON
document: {"steps", "first_loss", "last_loss", "moved": {"mean_step", "share"}}, of all matrices the
mean of how far a weight went over its block's int4 step, and the share that went at all.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.models import load_model, quiet_transformers
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import add_model_flag, whole_number
from lib.errors import InputError
from lib.progress import show_progress
from lib.text.held_out import load_tokenizer
from scripts.experiments.exact.prompts import read_prompts

_LEVELS = 15
"""Steps of a 4-bit grid between the least and the largest weight."""
_GROUP = 64
"""Weights of a row that share a scale."""
_TEXT_SEED = 1_000
"""Other text than what acceptance is measured on with small seeds."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.output.exists():
        raise InputError(f"--output {args.output} exists: give a new folder")
    quiet_transformers(progress=False)
    tokenizer = load_tokenizer(args.model)
    model: Any = load_model(args.model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    texts_NT = torch.tensor(
        [
            ids
            for kind in ("code", "prose")
            for ids in read_prompts(
                tokenizer, kind, count=args.steps, tokens=args.tokens, seed=_TEXT_SEED
            )
        ]
    )
    losses = tune(model, texts_NT, steps=args.steps, rate=args.learning_rate)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    document = {
        "steps": args.steps,
        "tokens_per_step": 2 * args.tokens,
        "learning_rate": args.learning_rate,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "moved": moved(before, dict(model.named_parameters())),
    }
    emit_json(document, args.json)
    return 0


def tune(model: Any, texts_NT: Tensor, *, steps: int, rate: float) -> list[float]:
    """Take steps on two texts each, one of either kind; returns the losses, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in show_progress(range(steps), "steps", total=steps):
        ids_BT = texts_NT[[step, step + steps]]
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Return how far matrices' weights went, over the int4 step of their group, and how many."""
    steps, shares = [], []
    for name, old in before.items():
        if old.dim() != 2 or old.shape[1] % _GROUP:
            continue
        groups = old.reshape(-1, _GROUP)
        grid = (groups.amax(1) - groups.amin(1)).clamp_min(1e-12) / _LEVELS
        distance = (after[name].detach() - old).abs().reshape(-1, _GROUP)
        steps.append((distance / grid[:, None]).mean())
        shares.append((distance > 0).float().mean())
    return {
        "mean_step": float(torch.stack(steps).mean()),
        "share": float(torch.stack(shares).mean()),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a model for a few steps, and save it.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    add_model_flag(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--steps", type=whole_number(1), default=24, metavar="N", help=default)
    parser.add_argument(
        "--tokens", type=whole_number(2), default=128, metavar="N", help=f"of a text {default}"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4, metavar="R", help=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document here as well")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
