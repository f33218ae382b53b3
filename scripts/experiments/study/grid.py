"""Which models the study trains: one preset, changed in one respect at a time, with several seeds.

- *base*: every corpus and seed, judged at every checkpoint;
- *sizes*: other widths and depths, every corpus, one seed each, judged at the end;
- *variants*: what scales Adam's moment or blurs it (beta2, batch size, clipping, late learning
  rate), every seed on the first corpus, judged at the end, each beside the base run of its seed.

Corpora are what every machine has: Python's standard library, and the C++ headers that come with
torch. A training that is there already is not repeated.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpt2.rundir import ROOT
from gpt2.train import train
from lib.config import Config, load_config
from lib.errors import InputError
from lib.kconfig import read_assignments

PRESET = ROOT / "defconfigs" / "gpt2-study"
Value = str | int | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One training: what it differs in from the preset, and how it is grouped."""

    corpus: str
    seed: int
    size: str = "base"
    variant: str = "base"
    symbols: Mapping[str, Value] = field(default_factory=dict)
    every_checkpoint: bool = False

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.corpus}-{self.size}-{self.variant}-{self.seed}"


def corpora() -> dict[str, dict[str, Value]]:
    """Return the corpora, first the one that variants are trained on."""
    headers = Path(torch.__file__).parent / "include" / "torch"
    return {
        "python": {"DATA_STDLIB": True},
        "cpp": {"DATA_FILES": True, "DATA_FILES_GLOB": str(headers / "**" / "*.h")},
    }


SIZES: dict[str, dict[str, Value]] = {
    "2x128": {"GPT2_LAYERS": 2, "GPT2_WIDTH": 128},
    "6x128": {"GPT2_LAYERS": 6, "GPT2_WIDTH": 128},
}
VARIANTS: dict[str, dict[str, Value]] = {
    "beta2 0.95": {"TRAIN_BETA2": "0.95"},
    "beta2 0.999": {"TRAIN_BETA2": "0.999"},
    "batch 2": {"TRAIN_BATCH_SIZE": 2},
    "batch 32": {"TRAIN_BATCH_SIZE": 32},
    "clip off": {"TRAIN_CLIP": "0"},
    "clip 0.25": {"TRAIN_CLIP": "0.25"},
    "final lr 0 %": {"TRAIN_MIN_LR_PCT": 0},
    "final lr 100 %": {"TRAIN_MIN_LR_PCT": 100},
}
SEEDS = (0, 1, 2)
TOY: dict[str, Value] = {
    "GPT2_LAYERS": 2,
    "GPT2_CONTEXT": 32,
    "GPT2_VOCAB_SIZE": 300,
    "DATA_MAX_MIB": 1,
    "TRAIN_STEPS": 8,
    "TRAIN_WARMUP_STEPS": 2,
    "TRAIN_EVAL_EVERY": 8,
    "TRAIN_EVAL_SEQUENCES": 16,
    "TRAIN_CHECKPOINT_EVERY": 4,
    "BENCH_SEQ_LENGTH": 32,
}
"""What ``--quick`` changes: every part runs, no figure means anything."""


def list_runs(*, quick: bool) -> list[StudyRun]:
    """Return the trainings in the order in which they tell most."""
    texts = corpora()
    first = next(iter(texts))
    toy: dict[str, Value] = TOY if quick else {}
    seeds = SEEDS[:2] if quick else SEEDS
    variants = {"beta2 0.95": VARIANTS["beta2 0.95"]} if quick else VARIANTS
    base = [
        StudyRun(corpus=corpus, seed=seed, symbols={**symbols, **toy}, every_checkpoint=True)
        for seed in seeds
        for corpus, symbols in texts.items()
    ]
    changed = [
        StudyRun(corpus=first, seed=seed, variant=name, symbols={**texts[first], **toy, **symbols})
        for seed in seeds
        for name, symbols in variants.items()
    ]
    sizes = [
        StudyRun(corpus=corpus, seed=seeds[0], size=size, symbols={**symbols, **shape})
        for size, shape in ({} if quick else SIZES).items()
        for corpus, symbols in texts.items()
    ]
    return [*base, *sizes, *changed]


def train_run(run: StudyRun, folder: Path) -> Config:
    """Train a run below ``folder``, unless that was done; returns its configuration."""
    path = folder / "configs" / f"{_plain(run.name)}.config"
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        **run.symbols,
        "RUN_NAME": _plain(run.name),
        "RUN_OUTPUT_DIR": str(folder),
        "RUN_SEED": run.seed,
        "DATA_CACHE_DIR": str(folder / "data"),
        "TIERING_GENERATE_JSON": False,
    }
    kept = [
        f"CONFIG_{name}={assignment.value}"
        for name, assignment in read_assignments(PRESET).items()
        if name not in values
    ]
    given = [f"CONFIG_{name}={_kconfig(value)}" for name, value in values.items()]
    path.write_text("\n".join([*kept, *given]) + "\n")
    config = load_config(path)
    print(f"run {run.name}", file=sys.stderr, flush=True)
    result = train(config, path)
    if not result["complete"]:
        raise KeyboardInterrupt  # it was told to stop, and saved
    return config


def kept_steps(run: StudyRun, config: Config) -> Sequence[int]:
    """Return the steps at which a run is judged."""
    last, every = config.train.steps, config.train.checkpoint_every
    return [*range(every, last, every), last] if run.every_checkpoint else [last]


def kept_checkpoint(config: Config, step: int) -> Path:
    """Return the folder of a kept checkpoint; InputError if it isn't there."""
    path = config.run.directory / "steps" / str(step)
    if not path.is_dir():
        raise InputError(
            f"{path} is missing, though the run is complete: delete {config.run.directory} to "
            "train it again"
        )
    return path


def _plain(name: str) -> str:
    return name.replace(" ", "-").replace("%", "pct")


def _kconfig(value: Value) -> str:
    if isinstance(value, bool):
        return "y" if value else "n"
    return f'"{value}"' if isinstance(value, str) else str(value)
