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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from ..extras import need_extra
from ..hints import Hints, load_hints
from ..precision.floors import read_trust
from ..tiering.planning.budget import parse_budget, read_budget
from ..units import format_bytes, parse_bytes, parse_number
from ..vocabulary import Precision
from .cli import emit
from .flags import check_epsilon, parse_device, planned_precision
from .serve_flags import KEY, make_parser

if TYPE_CHECKING:
    from ..serving.serve import Endpoint


class _Wanted(NamedTuple):
    """What flags say, read."""

    kv_budget: int
    max_body: int
    default_bound: Any
    hints: Hints | None
    device: Any
    budget: Any


def main(argv: Sequence[str] | None = None) -> int:
    """Load, listen, and answer until a signal; returns the exit code."""
    args = make_parser().parse_args(argv)
    if args.ray and args.control is not None:
        raise InputError("--control is of a single server: leave it or --ray out")
    for package in ("fastapi", "uvicorn", "openai", "prometheus_client"):
        need_extra("serve", package)
    if args.ray:
        need_extra("ray", "ray")
    elif args.replicas is not None:
        raise InputError("--replicas are of Ray Serve: add --ray, or leave them out")
    _read(args)

    from ..checkpoint.hub import checkpoint_folder
    from ..serving.serve import listen, run_until_stopped, served_name

    checkpoint_folder(args.model)
    args.name = served_name(args.model, args.name)
    args.api_key = args.api_key or os.environ.get(KEY) or None
    if args.ray:
        return _serve_replicas(args)
    listener = listen(args.host, args.port)
    with open_endpoint(args) as endpoint:
        document = {"url": listener.url, **endpoint.document}
        _tell(args, document)
        if not args.check:
            run_until_stopped(endpoint.gate, listener, drain_seconds=args.drain_seconds)
    return 0


def _serve_replicas(args: argparse.Namespace) -> int:
    """Serve on Ray, each replica as these flags say."""
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # its reports go to its files

    from ..serving.cluster import deploy
    from ..serving.settings import Access

    paths = {
        name: value.absolute() for name, value in vars(args).items() if isinstance(value, Path)
    }
    if Path(args.model).is_dir():
        paths["model"] = Path(args.model).absolute()
    absolute = argparse.Namespace(**{**vars(args), **paths})
    access = Access(
        api_key=args.api_key,
        max_body_bytes=parse_bytes(args.max_body),
        max_seconds=args.max_seconds,
    )
    with deploy(
        partial(open_endpoint, absolute),
        access,
        replicas=args.replicas or 1,
        host=args.host,
        port=args.port,
    ) as deployed:
        _tell(args, deployed.document)
        if not args.check:
            deployed.run_until_stopped(drain_seconds=args.drain_seconds)
    return 0


def _read(args: argparse.Namespace) -> _Wanted:
    """Read flags; raises InputError for what needs no model to be seen as wrong."""
    check_epsilon(args)
    _check_calibrated_weights(args)
    hints = None if args.tier_hints is None else load_hints(args.tier_hints)
    if hints is not None and args.epsilon is not None:
        read_trust(hints.quality)
    device = parse_device(args.device)
    return _Wanted(
        kv_budget=parse_bytes(args.kv_budget),
        max_body=parse_bytes(args.max_body),
        default_bound=_default_bound(args.default_bound),
        hints=hints,
        device=device,
        budget=parse_budget(read_budget(args.budget), device, "real"),
    )


@contextmanager
def open_endpoint(args: argparse.Namespace) -> Iterator["Endpoint"]:
    """Load a model, and answer with it as flags say, until it is closed."""
    from ..checkpoint.hub import checkpoint_folder
    from ..checkpoint.load import load
    from ..checkpoint.models import quiet_transformers
    from ..evaluation.calibrate_requests import calibration_keys
    from ..progressive.audit_file import AuditFile
    from ..progressive.calibration import load_calibration
    from ..progressive.engine import Engine
    from ..serving.app import make_app
    from ..serving.control import watched_budget
    from ..serving.serve import Endpoint, describe_model, ignored_settings
    from ..serving.settings import Settings
    from ..text.held_out import load_tokenizer
    from ..tiering import attach

    wanted = _read(args)
    folder = checkpoint_folder(str(args.model))
    quiet_transformers(progress=sys.stderr.isatty())
    model = load(folder)
    tokenizer = load_tokenizer(str(folder))
    card = describe_model(model, tokenizer, name=args.name)
    if ignored := ignored_settings(model):
        print(
            f"note: {', '.join(ignored)} of generation_config.json have no effect here",
            file=sys.stderr,
        )
    settings = Settings(
        model=card,
        api_key=args.api_key,
        default_bound=wanted.default_bound,
        max_body_bytes=wanted.max_body,
        max_new_tokens=args.max_new_tokens,
        max_seconds=args.max_seconds,
    )
    with attach(
        model,
        wanted.hints,
        budget=wanted.budget,
        weights=folder,
        precision=planned_precision(args.precision),
        epsilon=args.epsilon,
        device=wanted.device,
    ):
        calibration = audit_file = None
        if args.calibration is not None:
            calibration = load_calibration(args.calibration, calibration_keys(model))
            audit_file = AuditFile(args.calibration, calibration.digest)
        engine = Engine(
            model,
            kv_budget=wanted.kv_budget,
            ladder=args.ladder,
            folder=args.spill_dir,
            context=args.context,
            calibration=calibration,
            audit_file=audit_file,
            max_queue=args.max_queue,
        )
        with engine, watched_budget(engine, args.control):
            document: dict[str, Any] = {
                "model": card.name,
                "context": engine.context,
                "tiers": list(engine.ladder.names),
                "kv_budget": wanted.kv_budget,
                "token_bytes": {
                    name: engine.ladder.num_bytes(tier, engine.context) / engine.context
                    for tier, name in enumerate(engine.ladder.names)
                },
                "chat": card.chat,
                "needs_key": settings.api_key is not None,
            }
            yield Endpoint(gate=make_app(engine, tokenizer, settings), document=document)


def _tell(args: argparse.Namespace, document: Mapping[str, Any]) -> None:
    emit(_table(document), document, args.json)


def _table(document: Mapping[str, Any]) -> str:
    replicas = document.get("replicas")
    each = "" if replicas is None else f" for each of {replicas} replicas"
    lines = [
        f"{document['model']} at {document['url']}, texts of {document['context']} tokens at most",
        f"keys and values: {format_bytes(document['kv_budget'])} of fast memory{each}",
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
