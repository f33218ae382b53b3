"""What is decoded: a trained model, and shapes with random weights, of which time alone counts."""

import argparse
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from lib.kconfig import ROOT
from scripts.demo import HINTS, prepare_model
from scripts.experiments.decode.peers.llama_cpp import read_shapes
from scripts.experiments.offload.checkpoint import GPT2_MEDIUM, NARROW, make_checkpoint
from scripts.experiments.offload.shapes import Shape

SMOLLM2 = "smollm2"
RANDOM: dict[str, Shape] = {"gpt2_medium": GPT2_MEDIUM, "llama_30x64": NARROW}
"""Shapes with random weights."""
MODELS = (SMOLLM2, *RANDOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchModel:
    """A checkpoint, and the folder for what systems make of it. ``trained``: its logits mean
    something; ``hints``: what plans within an epsilon are made from.
    """

    name: str
    checkpoint: Path
    folder: Path
    trained: bool
    hints: Path | None

    @property
    def vocab_size(self) -> int:
        """The number of tokens that it knows."""
        return int(json.loads((self.checkpoint / "config.json").read_text())["vocab_size"])

    @property
    def num_weights(self) -> int:
        """The weights of its matrices."""
        shapes = read_shapes(self.checkpoint).values()
        return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the models, and where they are made."""
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=[SMOLLM2, "llama_30x64"],
        help=f"what is decoded (default: {SMOLLM2} llama_30x64)",
    )
    parser.add_argument("--model", type=Path, help=f"a checkpoint in the place of {SMOLLM2}'s")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=ROOT / "runs" / "decode",
        metavar="DIR",
        help="for the random checkpoint (default: runs/decode)",
    )


def find_model(
    name: str, *, checkpoint: Path | None, hints: Path | None, demo_folder: Path, work_dir: Path
) -> BenchModel:
    """Return a model of the benchmark, made or downloaded where it isn't there. ``checkpoint``: to
    take for the trained one instead of the demo's, with hints of its own.
    """
    if name in RANDOM:
        path = make_checkpoint(RANDOM[name], work_dir)
        folder = _own_folder(path, work_dir)
        return BenchModel(name=name, checkpoint=path, folder=folder, trained=False, hints=None)
    path = checkpoint or prepare_model(demo_folder)
    if hints is None and checkpoint is None:
        hints = HINTS
    folder = _own_folder(path, work_dir)
    return BenchModel(name=name, checkpoint=path, folder=folder, trained=True, hints=hints)


def _own_folder(checkpoint: Path, work_dir: Path) -> Path:
    """Return a folder that belongs to these files of weights."""
    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(checkpoint.glob("*.safetensors"))
    ]
    folder = work_dir / f"gguf-{hashlib.sha256(repr(files).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
