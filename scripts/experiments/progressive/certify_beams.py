"""How wide a beam has to be until its text is known to be the most probable of all.

    python scripts/experiments/progressive/certify_beams.py --model runs/progressive-recall \
        --json docs/results/beams.json

Requests of ``workload.py``, easy to hard. Beside the width that certified each stands how often the
narrowest beam, which is greedy, had that text already.
stdout ends with one JSON document.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.commands.flags import whole_number
from lib.files import check_writable
from lib.progressive.beams import WIDTHS, BeamResult, CausalScorer, search
from scripts.experiments.progressive.workload import END, load_or_train, make_requests

KINDS = ("recall", "queries", "needle", "text")
DIFFICULTIES = (0.0, 0.5, 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    model, _ = load_or_train(args.model)
    scorer = CausalScorer(model)
    found: dict[float, list[tuple[BeamResult, BeamResult]]] = {}
    for difficulty in DIFFICULTIES:
        for kind in KINDS:
            for item in make_requests(kind, difficulty, args.requests, args.seed):
                asked: dict[str, Any] = {
                    "max_new_tokens": len(item.answer),
                    "end_ids": frozenset({END}),
                }
                wide = search(scorer, item.prompt, **asked)
                narrow = search(scorer, item.prompt, **asked, widths=WIDTHS[:1])
                found.setdefault(difficulty, []).append((wide, narrow))
    document: dict[str, Any] = {
        "widths": list(WIDTHS),
        "torch": torch.__version__,
        "difficulties": {
            str(difficulty): summarize(results) for difficulty, results in found.items()
        },
    }
    for name, figures in document["difficulties"].items():
        cells = (f"{width} {share:.2f}" for width, share in figures["certified_at"].items())
        print(
            f"difficulty {name}: certified at width {'  '.join(cells)}; never "
            f"{figures['uncertified']:.2f}; rows {figures['rows']:.1f} times greedy's; greedy's "
            f"text is the most probable in {figures['greedy_is_best']:.2f} of those certified"
        )
    emit_json(document, args.json)
    return 0


def summarize(results: Sequence[tuple[BeamResult, BeamResult]]) -> dict[str, Any]:
    certified = [pair for pair in results if pair[0].certified]
    widths = Counter(wide.width for wide, _ in certified)
    return {
        "requests": len(results),
        "certified_at": {str(width): widths[width] / len(results) for width in WIDTHS},
        "uncertified": 1 - len(certified) / len(results),
        "rows": mean(wide.rows / narrow.rows for wide, narrow in results),
        "greedy_is_best": mean(wide.tokens == narrow.tokens for wide, narrow in certified)
        if certified
        else None,
        "probability": mean(float(torch.tensor(wide.log_probability).exp()) for wide, _ in results),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Widen beams until their texts are certified.")
    default = "(default: %(default)s)"
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("runs/progressive-recall"),
        metavar="DIR",
        help=f"trained where there is none {default}",
    )
    parser.add_argument(
        "--requests",
        type=whole_number(1),
        default=8,
        metavar="N",
        help=f"of each kind and difficulty {default}",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
