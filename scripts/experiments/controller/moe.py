"""Decode a trained mixture with a share of its experts in fast memory, under several policies.

    python scripts/experiments/controller/moe.py --model runs/moe-quickstart/checkpoint

The text is given: held-out tokens are fed one by one after a prompt, so that every policy meets the
same routing, and outputs are compared bit for bit. All policies run in the engine; only the
choice of what stays differs, and whether anything is read ahead. Each has a copy of the model, and
they take turns at every token, so that what the machine does meanwhile is the same for all. The
link is emulated on a virtual clock, with the bandwidth at which an expert's transfer takes x times
a layer's compute c (that of LRU in such turns, with nothing to wait for): seconds are those of
computing and those charged.
``--spill-dir`` adds a run on a real disk.

Two bounds, not to be taken for one another: ``bound`` reads Belady's bytes and hides all it can
(no policy is faster); ``ceiling`` is what the simulator makes of the engine's own predictions, each
known a whole layer before, with costless predicting.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.models import load_model, quiet_transformers
from lib.commands.cli import Parser, emit, run_main
from lib.commands.flags import whole_number
from scripts.experiments.controller.decoding import Given, decode, read_given
from scripts.experiments.controller.policies import POLICIES, Bench

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4)
RATIOS = (0.25, 0.5, 1.0, 2.0)
_MAIN_RATIO = 1.0


def run_moe(
    model: Any,
    given: Given,
    *,
    hints: Path | None = None,
    shares: Sequence[float] = SHARES,
    ratios: Sequence[float] = RATIOS,
    rounds: int = 3,
    spill_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return the figures of the contract at x/c = 1 (else the first of ``ratios``), and under
    ``ratios`` those of all. Raises InputError for a model whose experts don't move one by one.
    """
    reference = decode(model, given).logits
    bench = Bench(model, given, hints, reference, rounds)
    main = _MAIN_RATIO if _MAIN_RATIO in ratios else ratios[0]
    found: dict[str, Any] = {
        "x_over_c": main,
        "layer_compute_s": bench.layer_seconds,
        "expert_bytes": bench.expert_bytes,
        "decoded_tokens": given.num_decoded,
        "rounds": rounds,
        "resident": {},
        "ratios": {str(ratio): {} for ratio in ratios},
    }
    for share in shares:
        by_ratio = bench.run_share(share, ratios)
        for ratio, figures in by_ratio.items():
            found["ratios"][str(ratio)][str(share)] = figures
            say(f"\n{_lines(share, ratio, figures)}")
        found["resident"][str(share)] = by_ratio[main]
    middle = min(shares, key=lambda share: abs(share - 0.2))
    ahead = found["resident"][str(middle)]["ours"]
    recording = bench.recording
    found["lookahead"] = {
        "slot_recall": recording.share(recording.recall),
        "slot_recall_without_first_layer": recording.share(recording.recall, first=1),
        "control_recall": recording.share(recording.control),
        "miss_coverage": ahead["miss_coverage"],
        "wasted_per_useful": ahead["wasted_per_useful"],
        "resident": middle,
    }
    found["outputs_equal"] = bench.outputs_equal
    found["group"] = bench.run_group(main)
    if spill_dir is not None:
        found["disk"] = bench.run_disk(middle, spill_dir)
    return found


def run_share(
    model: Any, given: Given, *, hints: Path | None, share: float, rounds: int
) -> dict[str, Any]:
    """Return and print what each policy does with one share of experts at x/c = 1."""
    bench = Bench(model, given, hints, decode(model, given).logits, rounds)
    figures = bench.run_share(share, [_MAIN_RATIO])[_MAIN_RATIO]
    print(_lines(share, _MAIN_RATIO, figures))
    return {**figures, "outputs_equal": bench.outputs_equal}


def _lines(share: float, ratio: float, figures: dict[str, Any]) -> str:
    lines = [
        f"{share:.0%} of experts resident, x/c = {ratio:g}",
        f"{'':16} {'resident':>8} {'ready':>8} {'KiB/token':>10} {'stall ms':>9} {'tokens/s':>9}",
    ]
    for name in (*POLICIES, "ceiling", "bound"):
        each = figures[name]
        ready = "-" if each["ready_hit"] is None else f"{each['ready_hit']:.1%}"
        lines.append(
            f"{name:16} {each['resident_hit']:>8.1%} {ready:>8} {each['bytes'] / 1024:>10.0f} "
            f"{1e3 * each['stall_s']:>9.2f} {each['tokens_per_s']:>9.1f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    quiet_transformers(progress=False)
    model = load_model(args.model).eval()
    given = read_given(
        model,
        args.model,
        sequences=args.sequences,
        prompt_tokens=args.prompt_tokens,
        cpu_time=args.cpu_time,
    )
    found = run_moe(
        model,
        given,
        hints=args.tier_hints,
        shares=args.resident,
        ratios=args.ratios,
        rounds=args.rounds,
        spill_dir=args.spill_dir,
    )
    emit(summary(found), found, args.json)
    return 0


def summary(found: dict[str, Any]) -> str:
    """Return what the tables don't say."""
    ahead, group = found["lookahead"], found["group"]
    lines = [
        f"look-ahead: recall {ahead['slot_recall']:.1%} ("
        f"{ahead['slot_recall_without_first_layer']:.1%} without the first layer, "
        f"{ahead['control_recall']:.1%} with the router's true input); at "
        f"{ahead['resident']:.0%} resident {_share(ahead['miss_coverage'])} of misses foreseen, "
        f"{_share(ahead['wasted_per_useful'])} wasted per useful",
        f"one by one {group['one_by_one']['tokens_per_s']:.1f} tokens/s, as a group "
        f"{group['group']['tokens_per_s']:.1f}: {group['ratio']:.2f} times",
        f"outputs equal: {found['outputs_equal']}",
    ]
    if "disk" in found:
        lines.append(_lines_of_disk(found["disk"]))
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _lines_of_disk(disk: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {disk[name]['tokens_per_s']:.1f}" for name in POLICIES)
    return f"on the disk (x/c = {disk['x_over_c']:.2f}), tokens/s: {rates}"


def _numbers(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--tier-hints", type=Path, metavar="FILE", help="its hints")
    parser.add_argument(
        "--resident", type=_numbers, default=list(SHARES), metavar="S,...", help="shares of experts"
    )
    parser.add_argument(
        "--ratios", type=_numbers, default=list(RATIOS), metavar="X,...", help="values of x/c"
    )
    parser.add_argument("--sequences", type=whole_number(1), default=4, help="of held-out text")
    parser.add_argument("--prompt-tokens", type=whole_number(1), default=16, help="of each")
    parser.add_argument(
        "--rounds", type=whole_number(1), default=1, help="of all, from empty caches"
    )
    parser.add_argument("--threads", type=whole_number(1), default=1, help="of torch")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the thread's own time, on a shared machine"
    )
    parser.add_argument("--spill-dir", type=Path, metavar="FOLDER", help="a run on this disk too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
