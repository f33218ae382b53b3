"""How many bytes a dense cycle moves per token, beside what caches of the same size would.

    python scripts/experiments/controller/dense.py --model ./my-model --share 0.6

Every block is used once per token, in the same order. All policies have the same fast memory, and
stream through the slots of *ours*; what is left beside them is their cache. *ours* begins with
everything resident and is taken down to the budget by the controller; *static* is the planner's
plan for it, which may have other slots. Both run, and their bytes are counted. LRU, LFU and Belady
are played through on the same uses and sizes: Belady's figure is the bound that no cache of this
size can beat, whole blocks or not: in a cycle each block waits as long as every other, so a byte of
cache saves one byte per cycle.
"""

import argparse
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.models import load_model, quiet_transformers
from lib.commands.cli import Parser, emit, run_main
from lib.commands.flags import whole_number
from lib.policy.plan import Plan
from lib.tiering import Runtime, attach
from lib.units import format_bytes, format_seconds
from lib.vocabulary import Tier

_CYCLES = 12
_WARM_CYCLES = 6


def run_dense(
    model: nn.Module,
    *,
    hints: Path | None = None,
    precision: str | None = None,
    share: float = 0.6,
    tokens: int = 8,
    spill_dir: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Return bytes per token, tokens/s and stalls of each policy; only what ran has the latter two.

    ``share``: of the memory that all weights take.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        options: dict[str, Any] = {
            "precision": precision,
            "spill_dir": spill_dir or Path(temporary),
        }
        with attach(model, hints, budget={"HBM": None, "SSD": None}, **options) as runtime:
            control = runtime.control()
            whole = runtime.plan.fast_bytes
            limit = max(round(share * whole), control.controller.floor_bytes)
            control.request(limit)
            found["ours"] = _decode(model, runtime, tokens)
            plan = runtime.plan
        with attach(model, hints, budget={"HBM": limit, "SSD": None}, **options) as runtime:
            found["static"] = _decode(model, runtime, tokens)
    sizes = streamed_sizes(plan)
    cache = _cache_bytes(plan)
    total = sum(sizes.values())
    found["belady"] = {"bytes": max(total - cache, 0)}
    found["lru"] = {"bytes": cycle_bytes(sizes, cache, least_used=False)}
    found["lfu"] = {"bytes": cycle_bytes(sizes, cache, least_used=True)}
    found["budget"] = {"bytes": limit, "cache_bytes": cache, "weight_bytes": total}
    for name in ("ours", "static", "lru", "lfu"):
        bound = found["belady"]["bytes"]
        found[name]["over_belady"] = found[name]["bytes"] / bound if bound else None
    return found


def _decode(model: Any, runtime: Runtime, tokens: int) -> dict[str, Any]:
    """Decode after a prompt of one token, and a few tokens to warm up."""
    prompt = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, min_new_tokens=3, max_new_tokens=3, **options)
    runtime.reset_stats()
    began = time.perf_counter()
    model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, **options)
    took = time.perf_counter() - began
    stats = runtime.stats()
    return {
        "bytes": stats.bytes_moved / stats.forwards,
        "tokens_per_s": tokens / took,
        "stall_s": stats.transfer_seconds / stats.forwards,
        "fast_bytes": runtime.plan.fast_bytes,
    }


def streamed_sizes(plan: Plan) -> dict[str, int]:
    """Return the bytes of the blocks that a token uses in full, in the order of the plan; those
    that are looked up only are left out, and so is what the plan has to keep.
    """
    return {
        name: place.stored_bytes
        for name, place in plan.placements.items()
        if place.tier is Tier.HBM or place.unit_bytes
    }


def _cache_bytes(plan: Plan) -> int:
    """Return what a plan's budget leaves for residents beside slots and scratch."""
    limit = plan.limit(Tier.HBM)
    assert limit is not None
    return limit - plan.scratch_bytes - plan.num_slots * plan.slot_bytes


def cycle_bytes(sizes: Mapping[str, int], cache: int, *, least_used: bool) -> int:
    """Return the bytes per cycle that a cache reads in the long run: LRU, or with ``least_used``
    LFU (counts of what is in it; of equal counts the least recently used goes).
    """
    held: OrderedDict[str, int] = OrderedDict()
    """Block -> its uses since it came, the least recently used first."""
    read = []
    for _ in range(_CYCLES):
        moved = 0
        for name, size in sizes.items():
            if name in held:
                held[name] += 1
                held.move_to_end(name)
                continue
            moved += size
            if size > cache:
                continue
            while sum(sizes[each] for each in held) + size > cache:
                victim = min(held, key=lambda each: held[each]) if least_used else next(iter(held))
                del held[victim]
            held[name] = 1
        read.append(moved)
    rest = read[_WARM_CYCLES:]
    return sum(rest) // len(rest)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    quiet_transformers(progress=False)
    found = run_dense(
        load_model(args.model).eval(),
        hints=args.tier_hints,
        precision=args.precision,
        share=args.share,
        tokens=args.tokens,
        spill_dir=args.spill_dir,
    )
    lines = [f"{'':8} {'bytes/token':>12} {'over Belady':>12} {'tokens/s':>9} {'stall/token':>12}"]
    for name in ("ours", "static", "lfu", "lru", "belady"):
        each = found[name]
        over, rate = each.get("over_belady"), each.get("tokens_per_s")
        lines.append(
            f"{name:8} {format_bytes(round(each['bytes'])):>12} "
            f"{'-' if over is None else f'{over:.4f}':>12} "
            f"{'-' if rate is None else f'{rate:.2f}':>9} "
            f"{'-' if rate is None else format_seconds(each['stall_s']):>12}"
        )
    emit("\n".join(lines), found, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--tier-hints", type=Path, metavar="FILE", help="its hints")
    parser.add_argument("--precision", metavar="NAME", help="hold weights in it (default: as is)")
    parser.add_argument("--share", type=float, default=0.6, help="of the memory that weights take")
    parser.add_argument("--tokens", type=whole_number(1), default=8, help="that are timed")
    parser.add_argument("--threads", type=whole_number(1), default=2, help="of torch")
    parser.add_argument("--spill-dir", type=Path, metavar="FOLDER", help="of what is away")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
