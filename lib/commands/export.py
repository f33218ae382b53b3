"""Write tier hints in the format of another tool, and say what that tool can't express.

    tierhints export --to accelerate --tier-hints tier_hints.json --model ./my-model

Formats: accelerate (device_map.json), torchao (torchao.json), llama-cpp (tensor_types.txt and
override_tensor.txt), imatrix (imatrix.gguf, from a Fisher diagonal) and vllm (vllm.yaml). Of a
safetensors checkpoint one weight at a time is read, to see that the hints are this model's.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..exports.tools import DEVICES, TOOLS, export
from .cli import Parser, add_json_flag, emit
from .flags import add_hints_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, write the files and print the result."""
    args = _parser().parse_args(argv)
    from ..checkpoint.models import quiet_transformers

    quiet_transformers(progress=False)
    exported = export(
        args.tier_hints,
        args.model,
        to=args.to,
        output=args.output,
        device=args.device,
        bits=args.bits,
        fisher=args.fisher,
    )
    for line in exported.lost:
        print(f"not expressed: {line}", file=sys.stderr)
    paths = [str(args.output / name) for name in exported.files]
    document = {
        "to": args.to,
        "files": paths,
        **exported.summary,
        "commands": list(exported.commands),
        "not_expressed": list(exported.lost),
    }
    emit(
        "\n".join([*(f"wrote {path}" for path in paths), "", *exported.commands]),
        document,
        args.json,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Write tier hints in the format of another tool.",
        epilog="What the tool can't express is said on stderr.",
    )
    default = "(default: %(default)s)"
    what = parser.add_argument_group("what is exported")
    what.add_argument("--to", required=True, choices=TOOLS, help="the tool")
    add_hints_flag(what, required=True)
    what.add_argument(
        "--model",
        metavar="DIR",
        help="the model the hints are for: folder or hub id (default: the hints' own, if a folder)",
    )
    what.add_argument(
        "--fisher",
        type=Path,
        metavar="FILE",
        help="for imatrix: the diagonal that tierhints collect --save-diagonal wrote",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--device",
        choices=DEVICES,
        default="cuda",
        help=f"what will compute, for accelerate and torchao; need not be here {default}",
    )
    how.add_argument(
        "--bits",
        type=float,
        metavar="MEAN",
        help="for torchao and llama-cpp: mean bits per quantized weight, scales included (default: "
        "the floors if every block has one, else the mean of the format's steps)",
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--output", type=Path, default=Path("export"), metavar="DIR", help=f"folder {default}"
    )
    add_json_flag(out)
    return parser
