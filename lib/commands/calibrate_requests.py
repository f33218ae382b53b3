"""Measure how far answers at compact keys and values are from the full model's, for bounds of
requests.

    tierhints calibrate-requests --model ./my-model --requests requests.jsonl \
        --output calibration.json
    tierhints serve --model ./my-model --calibration calibration.json

A line of the file is a request as OpenAI's API takes it: {"messages": [...]} or {"prompt": "..."},
with max_tokens. They should be like those that will be served: the bounds hold for like requests.
59 are enough for a delta of 0.05, 299 for 0.01.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import need_extra
from ..files import check_writable
from ..progress import progress_bar
from ..units import parse_bytes
from .cli import Parser, add_json_flag, emit, output_file
from .flags import add_model_flag, whole_number

_DELTAS = (0.01, 0.05, 0.1, 0.2)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, measure and write; returns the exit code."""
    args = _parser().parse_args(argv)
    for package in ("fastapi", "openai"):
        need_extra("serve", package)
    kv_budget = parse_bytes(args.kv_budget)
    check_writable(args.output)

    from ..checkpoint.hub import checkpoint_folder
    from ..checkpoint.models import load_model, quiet_transformers
    from ..evaluation.calibrate_requests import calibrate_requests
    from ..progressive.bounds import RequestError
    from ..progressive.ladder import UNIFORM
    from ..serving.recorded import read_requests
    from ..text.held_out import load_tokenizer

    folder = checkpoint_folder(args.model)
    quiet_transformers(progress=sys.stderr.isatty())
    model = load_model(str(folder))
    requests = read_requests(
        args.requests, model, load_tokenizer(str(folder)), new_tokens=args.new_tokens
    )
    tiers = len(args.ladder.split()) if args.ladder else len(UNIFORM)
    with progress_bar(len(requests) * tiers, "measuring") as bar:
        calibration = calibrate_requests(
            model,
            requests,
            kv_budget=kv_budget,
            tiers=args.ladder,
            folder=args.spill_dir,
            context=args.context,
            progress=bar.update,
        )
    calibration.save(args.output)
    factors: dict[str, float] = {}
    for delta in _DELTAS:
        try:
            factors[str(delta)] = calibration.factor(delta)
        except RequestError:
            continue
    document: dict[str, Any] = {
        "output": str(args.output),
        "requests": len(requests),
        "tiers": list(calibration.ladder.names[:-1]),
        "factors": factors,
    }
    emit(_table(document), document, args.json)
    return 0


def _table(document: dict[str, Any]) -> str:
    lines = [
        f"{document['output']}: {document['requests']} requests, each at "
        f"{', '.join(document['tiers'])}"
    ]
    for delta, factor in document["factors"].items():
        lines.append(f"  delta {delta:5} measured nats are at most {factor:.3g} times predicted")
    if not document["factors"]:
        lines.append(f"  too few for a delta of {_DELTAS[-1]}: no bound can be asked for yet")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.split("\n\n")[0].strip())
    default = "(default: %(default)s)"
    add_model_flag(parser)
    parser.add_argument(
        "--requests",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines: requests like those that will be served",
    )
    parser.add_argument(
        "--output",
        type=output_file,
        default=Path("calibration.json"),
        metavar="FILE",
        help=f"the calibration {default}",
    )
    parser.add_argument(
        "--new-tokens",
        type=whole_number(1),
        default=64,
        metavar="N",
        help=f"of an answer at most, where a request has no max_tokens {default}",
    )
    parser.add_argument(
        "--kv-budget",
        default="1GiB",
        metavar="SIZE",
        help=f"fast memory for keys and values {default}",
    )
    parser.add_argument(
        "--ladder",
        metavar="TIERS",
        help="tiers to measure, such as 'K4V4 K8V8' (default: all below full)",
    )
    parser.add_argument(
        "--context",
        type=whole_number(2),
        metavar="N",
        help="tokens of a prompt and its answer, at most (default: the model's context)",
    )
    parser.add_argument(
        "--spill-dir",
        type=Path,
        metavar="DIR",
        help="folder on a disk for the originals (default: a temporary one)",
    )
    add_json_flag(parser)
    return parser
