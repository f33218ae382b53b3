"""Serve a model over HTTP, as OpenAI's API does, each request at the quality that it asks for.

    tierhints serve --model ./my-model --port 8000

A request's ``quality_bound`` says how far its answer may be from the full model's, and its keys and
values are held in as little fast memory as that allows. Weights are as in ``tierhints generate``:
under a budget, at a precision, or within an epsilon. Ctrl-C and SIGTERM end it once the requests on
their way are answered.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..extras import need_extra
from ..hints import load_hints
from ..precision.floors import read_trust
from ..tiering.planning.budget import parse_budget, read_budget
from ..units import format_bytes, parse_bytes, parse_number
from ..vocabulary import Precision
from .cli import Parser, add_json_flag, emit
from .flags import (
    add_budget_flag,
    add_device_flag,
    add_hints_flag,
    add_model_flag,
    add_precision_flags,
    check_epsilon,
    parse_device,
    planned_precision,
    whole_number,
)

_KEY = "TIERHINTS_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Load, listen, and answer until a signal; returns the exit code."""
    args = _parser().parse_args(argv)
    for package in ("fastapi", "uvicorn", "openai", "prometheus_client"):
        need_extra("serve", package)
    kv_budget = parse_bytes(args.kv_budget)
    check_epsilon(args)
    _check_calibrated_weights(args)
    hints = None if args.tier_hints is None else load_hints(args.tier_hints)
    if hints is not None and args.epsilon is not None:
        read_trust(hints.quality)
    default_bound = _default_bound(args.default_bound)
    device = parse_device(args.device)
    budget = parse_budget(read_budget(args.budget), device, "real")

    from ..checkpoint.hub import checkpoint_folder
    from ..checkpoint.load import load
    from ..checkpoint.models import quiet_transformers
    from ..evaluation.calibrate_requests import calibration_keys
    from ..progressive.audit_file import AuditFile
    from ..progressive.calibration import load_calibration
    from ..progressive.engine import Engine
    from ..serving.app import make_app
    from ..serving.control import watched_budget
    from ..serving.serve import (
        describe_model,
        ignored_settings,
        listen,
        run_until_stopped,
        served_name,
    )
    from ..serving.settings import Settings
    from ..text.held_out import load_tokenizer
    from ..tiering import attach

    folder = checkpoint_folder(args.model)
    quiet_transformers(progress=sys.stderr.isatty())
    listener = listen(args.host, args.port)
    model = load(folder)
    tokenizer = load_tokenizer(str(folder))
    card = describe_model(model, tokenizer, name=served_name(args.model, args.name))
    if ignored := ignored_settings(model):
        print(
            f"note: {', '.join(ignored)} of generation_config.json have no effect here",
            file=sys.stderr,
        )
    settings = Settings(
        model=card,
        api_key=args.api_key or os.environ.get(_KEY) or None,
        default_bound=default_bound,
        max_body_bytes=parse_bytes(args.max_body),
        max_new_tokens=args.max_new_tokens,
        max_seconds=args.max_seconds,
    )
    with attach(
        model,
        hints,
        budget=budget,
        weights=folder,
        precision=planned_precision(args.precision),
        epsilon=args.epsilon,
        device=device,
    ):
        calibration = audit_file = None
        if args.calibration is not None:
            calibration = load_calibration(args.calibration, calibration_keys(model))
            audit_file = AuditFile(args.calibration, calibration.digest)
        engine = Engine(
            model,
            kv_budget=kv_budget,
            ladder=args.ladder,
            folder=args.spill_dir,
            context=args.context,
            calibration=calibration,
            audit_file=audit_file,
            max_queue=args.max_queue,
        )
        with engine, watched_budget(engine, args.control):
            gate = make_app(engine, tokenizer, settings)
            document: dict[str, Any] = {
                "url": listener.url,
                "model": card.name,
                "context": engine.context,
                "tiers": list(engine.ladder.names),
                "kv_budget": kv_budget,
                "token_bytes": {
                    name: engine.ladder.num_bytes(tier, engine.context) / engine.context
                    for tier, name in enumerate(engine.ladder.names)
                },
                "chat": card.chat,
                "needs_key": settings.api_key is not None,
            }
            emit(_table(document), document, args.json)
            if not args.check:
                run_until_stopped(gate, listener, drain_seconds=args.drain_seconds)
    return 0


def _table(document: dict[str, Any]) -> str:
    lines = [
        f"{document['model']} at {document['url']}, texts of {document['context']} tokens at most",
        f"keys and values: {format_bytes(document['kv_budget'])} of fast memory",
    ]
    for name, size in document["token_bytes"].items():
        lines.append(f"  {name:6} {format_bytes(size)} per token")
    return "\n".join(lines)


def _check_calibrated_weights(args: argparse.Namespace) -> None:
    """Raise InputError for a calibration beside weights that are compressed: it is of the model's
    own, and KL divergences don't add up (docs/serving.md).
    """
    precision = planned_precision(args.precision)
    compressed = precision not in (None, Precision.FP32) or (
        precision is None and args.epsilon is not None
    )
    if args.calibration is not None and compressed:
        flag = f"--epsilon {args.epsilon}" if precision is None else f"--precision {precision}"
        raise InputError(
            f"--calibration bounds the distance from the model's own weights, and {flag} makes "
            "others of them: what they cost isn't in its bounds, and can't be added to them (KL "
            "has no triangle inequality); leave one of the two out"
        )


def _default_bound(text: str) -> Any:
    """Return the bound of ``--default-bound``; None: full precision."""
    from ..progressive.bounds import Metric, QualityBound

    if text == "full":
        return None
    if text == "exact":
        return QualityBound(metric=Metric.EXACT)
    epsilon, _, delta = text.partition(",")
    names = {"name": "--default-bound", "example": "0.05, or 0.05,0.01 with a delta"}
    return QualityBound(
        epsilon=parse_number(epsilon, interval="[0, inf)", **names),
        delta=parse_number(delta or 0.0, interval="[0, 1)", **names),
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Serve a model over HTTP as OpenAI's API does; a request's quality_bound says how far its "
        "answer may be from the full model's.",
        epilog="Ctrl-C and SIGTERM end it once the requests on their way are answered.",
    )
    default = "(default: %(default)s)"
    model = parser.add_argument_group("model")
    add_model_flag(model)
    model.add_argument(
        "--name", help="what requests call it (default: its id, or its folder's name)"
    )
    add_hints_flag(model)
    add_device_flag(model)
    weights = parser.add_argument_group("weights")
    add_budget_flag(weights, otherwise="%(default)s, all in fast memory")
    parser.set_defaults(budget="HBM=")
    add_precision_flags(weights)
    states = parser.add_argument_group("keys and values")
    states.add_argument(
        "--kv-budget",
        default="1GiB",
        metavar="SIZE",
        help=f"fast memory for those of all requests together {default}",
    )
    states.add_argument(
        "--control",
        type=Path,
        metavar="FILE",
        help="control file, by which tierhints monitor changes that while it runs (default: none)",
    )
    states.add_argument(
        "--ladder",
        metavar="TIERS",
        help="tiers that they may be held at, low to high, such as 'K4V4 K8V8'; full is always one "
        "(default: all that make them smaller)",
    )
    states.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="of tierhints calibrate-requests: bounds with a delta take one (default: none)",
    )
    states.add_argument(
        "--default-bound",
        default="full",
        metavar="BOUND",
        help="quality_bound of requests without one: full, exact, nats per token (0.05), or these "
        f"and a delta (0.05,0.01) {default}",
    )
    states.add_argument(
        "--spill-dir",
        type=Path,
        metavar="DIR",
        help="folder on a disk for the originals of compressed ones (default: a temporary one)",
    )
    states.add_argument(
        "--context",
        type=whole_number(2),
        metavar="N",
        help="tokens of a prompt and its answer, at most (default: the model's context)",
    )
    address = parser.add_argument_group("address")
    address.add_argument("--host", default="127.0.0.1", help=f"where it listens {default}")
    address.add_argument(
        "--port", type=whole_number(0, 65535), default=8000, help=f"0: a free one {default}"
    )
    address.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what requests have to bring; better in ${_KEY}, which other users of the machine "
        "can't read (default: nothing)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-queue",
        type=whole_number(1),
        default=256,
        metavar="N",
        help=f"requests that may wait {default}",
    )
    limits.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=4096,
        metavar="N",
        help=f"tokens of an answer, at most {default}",
    )
    limits.add_argument(
        "--max-body", default="2MiB", metavar="SIZE", help=f"bytes of a request {default}"
    )
    limits.add_argument(
        "--max-seconds",
        type=whole_number(1),
        default=600,
        metavar="S",
        help=f"from a request's arrival to its end {default}",
    )
    limits.add_argument(
        "--drain-seconds",
        type=whole_number(0),
        default=30,
        metavar="S",
        help=f"how long requests on their way may take after a signal {default}",
    )
    parser.add_argument(
        "--check", action="store_true", help="load, listen, say what would be served, and end"
    )
    add_json_flag(parser)
    return parser
