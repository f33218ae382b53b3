"""The flags of ``tierhints serve``."""

from pathlib import Path

from .cli import Parser, add_json_flag
from .flags import (
    add_budget_flag,
    add_device_flag,
    add_hints_flag,
    add_model_flag,
    add_precision_flags,
    whole_number,
)

KEY = "TIERHINTS_API_KEY"
"""The variable of ``--api-key``."""


def make_parser() -> Parser:
    """Return the parser of the flags."""
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
        help=f"what requests have to bring; better in ${KEY}, which other users of the machine "
        "can't read (default: nothing)",
    )
    address.add_argument(
        "--ray",
        action="store_true",
        help="serve on Ray: in the cluster that this machine is part of, or one that is started "
        "here (default: in this process)",
    )
    address.add_argument(
        "--replicas",
        type=whole_number(1, 1000),
        metavar="N",
        help="with --ray: models that answer side by side, each in memory of its own (default: 1)",
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
