"""Write tier hints in the format of another tool, and say what that tool can't express.

    tierhints export --to accelerate --tier-hints tier_hints.json --model ./my-model

Formats: accelerate (device_map.json), torchao (torchao.json), llama-cpp (tensor_types.txt and
override_tensor.txt), imatrix (imatrix.gguf, from a Fisher diagonal) and vllm (vllm.yaml). Of a
safetensors checkpoint one weight at a time is read, to see that the hints are this model's.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..exports import (
    Export,
    Outline,
    export_device_map,
    export_imatrix,
    export_llama_cpp,
    export_torchao,
    export_vllm,
)
from ..files import check_writable, write_bytes
from ..hints import Hints, load_hints
from .cli import Parser, add_json_flag, emit
from .flags import add_hints_flag

if TYPE_CHECKING:
    from torch import nn

_EXPORTS: dict[str, Callable[[Outline, argparse.Namespace], Export]] = {
    "accelerate": lambda outline, args: export_device_map(outline, device=args.device),
    "torchao": lambda outline, args: export_torchao(outline, device=args.device, bits=args.bits),
    "llama-cpp": lambda outline, args: export_llama_cpp(outline, bits=args.bits),
    "vllm": lambda outline, args: export_vllm(outline),
}
_WITH_BITS = ("torchao", "llama-cpp")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, write the files and print the result."""
    args = _parser().parse_args(argv)
    _check(args)
    hints = load_hints(args.tier_hints)
    outline, digest = _read_outline(args.model or _model_of(hints), hints)
    if args.to == "imatrix":
        export = export_imatrix(outline, args.fisher, parameter_digest=digest)
    else:
        export = _EXPORTS[args.to](outline, args)
    for name, content in export.files.items():
        data = content if isinstance(content, bytes) else content.encode()
        write_bytes(data, args.output / name)
    for line in export.lost:
        print(f"not expressed: {line}", file=sys.stderr)
    paths = [str(args.output / name) for name in export.files]
    document = {
        "to": args.to,
        "files": paths,
        **export.summary,
        "commands": list(export.commands),
        "not_expressed": list(export.lost),
    }
    emit(
        "\n".join([*(f"wrote {path}" for path in paths), "", *export.commands]), document, args.json
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that don't go together, before a model is read."""
    if (args.fisher is None) == (args.to == "imatrix"):
        raise InputError(
            "--fisher FILE goes with --to imatrix, and only with it: make the file with "
            "tierhints collect --save-diagonal"
        )
    if args.bits is not None:
        if args.to not in _WITH_BITS:
            raise InputError(f"--bits goes with --to {' or '.join(_WITH_BITS)}, not {args.to}")
        if not (math.isfinite(args.bits) and 0 < args.bits <= 32):
            raise InputError(f"--bits {args.bits} is out of range: give more than 0, at most 32")
    check_writable(args.output / "file")


def _model_of(hints: Hints) -> str:
    name = hints.model.id if hints.model else ""
    if not (Path(name) / "config.json").is_file() or not name:
        raise InputError(
            f"the hints' model {name!r} is not a folder here: give its checkpoint with --model"
        )
    return name


def _read_outline(name: str, hints: Hints) -> tuple[Outline, str]:
    """Return the outline of a model whose weights are those of the hints, and their digest."""
    from ..blocks import parameter_digest
    from ..checkpoint.models import load_model, quiet_transformers
    from ..exports.model import outline_model

    quiet_transformers(progress=False)
    model, digest = _read_checkpoint(name)
    if digest is None:  # a hub id, pickled weights, or names that transformers converts
        model = load_model(name)
        digest = parameter_digest(model)
    assert model is not None
    return outline_model(model, hints, parameter_digest=digest), digest


def _read_checkpoint(name: str) -> "tuple[nn.Module | None, str | None]":
    """Build the model without memory for its weights, and read those one by one for the digest;
    None for a checkpoint that isn't safetensors of the model's own names.
    """
    from ..blocks import digest_parameters, unique_parameters
    from ..checkpoint.load import load
    from ..checkpoint.source import CheckpointSource

    folder = Path(name)
    if not folder.is_dir() or not any(folder.glob("*.safetensors*")):
        return None, None
    model: Any = load(folder)
    names: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(parameter_name)
    source = CheckpointSource(
        folder, base_model_prefix=model.base_model_prefix, tied=names.values()
    )
    own = sorted(unique_parameters(model))
    if not all(parameter in source for parameter in own):
        return None, None
    return model, digest_parameters((parameter, source.read(parameter)) for parameter in own)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Write tier hints in the format of another tool.",
        epilog="What the tool can't express is said on stderr.",
    )
    default = "(default: %(default)s)"
    what = parser.add_argument_group("what is exported")
    what.add_argument("--to", required=True, choices=[*_EXPORTS, "imatrix"], help="the tool")
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
        choices=("cuda", "cpu"),
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
