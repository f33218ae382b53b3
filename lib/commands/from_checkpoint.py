"""Make tier hints of a training checkpoint that exists, from the second moment in its optimizer's
state.

No text, no training, no gradients: the moments are read from the disk one tensor at a time. Formats
and what is refused: docs/from_checkpoint.md.

    tierhints from-checkpoint runs/mine/checkpoint-2000
"""

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError
from ..files import check_writable, parse_json
from ..hints import load_hints, save_hints
from ..progress import Progress, progress_bar
from ..units import parse_thresholds
from .cli import STDOUT, Parser, add_json_flag, emit
from .tier_table import add_tier_flags, summarize_tiers, tier_table

_KEPT = ("optimizer", "beta2", "step", "missing_moments", "tokens_per_update", "fisher_trace")
"""What the result takes from the provenance."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, read the state, write the hints and print the result."""
    args = _parser().parse_args(argv)
    hbm_threshold, cpu_threshold = parse_thresholds(
        args.hbm_threshold, args.cpu_threshold, names=("--hbm-threshold", "--cpu-threshold")
    )
    _check_output(args.output, "--output", load_hints)
    if args.json is not None and args.json != STDOUT:
        _check_output(args.json, "--json", _read_result)

    from ..checkpoint.models import quiet_transformers
    from ..signals import hints_from_checkpoint

    importlib.import_module("transformers.modeling_utils")  # seconds that are not the reading's
    quiet_transformers(progress=False)
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, _Bar() as bar:
        warnings.simplefilter("always", UserWarning)
        hints = hints_from_checkpoint(
            args.checkpoint,
            args.model,
            hbm_threshold=hbm_threshold,
            cpu_threshold=cpu_threshold,
            beta2=args.beta2,
            tokens_per_update=args.tokens_per_update,
            mean_clip_sq=args.mean_clip_sq,
            allow_missing=args.allow_missing,
            progress=bar.show,
        )
    for message in dict.fromkeys(str(each.message) for each in caught):
        print(f"note: {message}", file=sys.stderr)
    save_hints(hints, args.output)
    assert hints.model is not None
    mass = {
        name: float(hint.signals.get("adam_exp_avg_sq_sum", 0.0))  # type: ignore[arg-type]
        for name, hint in hints.blocks.items()
    }
    tiers = summarize_tiers(hints, mass)
    provenance = hints.provenance
    made = f"{provenance['source']}\n{provenance['format']}, {provenance['optimizer']} at step "
    emit(
        f"{made}{provenance['step']}\n\n{tier_table(hints, tiers, 'second moment')}",
        {
            "output": str(args.output),
            "checkpoint": str(args.checkpoint),
            "model": hints.model.id,
            "signal": provenance["signal"],
            "format": provenance["format"],
            "source": provenance["source"],
            **{key: provenance[key] for key in _KEPT},
            "adam_exp_avg_sq_sum": sum(mass.values()),
            "blocks": len(hints.blocks),
            "tiers": tiers,
            "seconds": round(time.perf_counter() - begin, 3),
        },
        args.json,
    )
    return 0


def _check_output(path: Path, flag: str, read: Callable[[Path], object]) -> None:
    """Refuse to replace what this verb didn't write: it may be of the very state that is read."""
    check_writable(path)
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        with path.open("rb") as file:
            if file.read(1) != b"{":
                raise InputError("no JSON")
        read(path)
    except (InputError, KeyError, UnicodeDecodeError) as error:
        raise InputError(
            f"output {path} exists and was not written by this command: give another name ({flag})"
        ) from error


def _read_result(path: Path) -> object:
    return parse_json(path.read_text(encoding="utf-8"))["adam_exp_avg_sq_sum"]


class _Bar:
    """A bar of parameters, whose number is known once they are."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def show(self, done: int, total: int) -> None:
        """Say how many of all are done."""
        if self._bar is None:
            self._bar = progress_bar(total, "moments", unit="tensor", delay=1.0)
        self._bar.update(1)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.split("\n\n")[0].strip())
    what = parser.add_argument_group("what is read")
    what.add_argument(
        "checkpoint",
        type=Path,
        help="a training checkpoint's folder (Trainer, accelerate, torch DCP, DeepSpeed ZeRO, "
        "tierhints), or its optimizer file",
    )
    what.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the model that was trained: config.json and safetensors weights (default: the "
        "checkpoint's own folder)",
    )
    what.add_argument(
        "--beta2", type=float, help="decay of the second moment, where the checkpoint has none"
    )
    what.add_argument(
        "--allow-missing",
        action="store_true",
        help="take a state without the moments of some parameters, which were frozen or had no "
        "gradient",
    )
    scale = parser.add_argument_group(
        "the signal's scale, if you know it (the order of blocks needs none of it)"
    )
    scale.add_argument(
        "--tokens-per-update",
        type=float,
        metavar="N",
        help="tokens that one optimizer step averaged, over accumulation and all processes",
    )
    scale.add_argument(
        "--mean-clip-sq",
        type=float,
        metavar="C",
        help="mean square of the clip coefficient, with --tokens-per-update; 1 where gradients "
        "were not clipped",
    )
    out = parser.add_argument_group("what is written")
    add_tier_flags(out)
    add_json_flag(out)
    return parser
