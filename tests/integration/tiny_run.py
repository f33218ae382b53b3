"""A run of seconds for end-to-end tests: a tiny GPT-2 on generated text."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lib.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]

_SYMBOLS: dict[str, Any] = {
    "RUN_NAME": "tiny",
    "RUN_SEED": 7,
    "RUN_DEVICE_CPU": True,
    "GPT2_LAYERS": 2,
    "GPT2_HEADS": 2,
    "GPT2_WIDTH": 16,
    "GPT2_CONTEXT": 16,
    "GPT2_VOCAB_SIZE": 300,
    "DATA_FILES": True,
    "DATA_HELDOUT_PERMILLE": 200,
    "TRAIN_STEPS": 8,
    "TRAIN_BATCH_SIZE": 4,
    "TRAIN_WARMUP_STEPS": 2,
    "TRAIN_LEARNING_RATE": "0.01",
    "TRAIN_EVAL_EVERY": 4,
    "TRAIN_EVAL_SEQUENCES": 6,
    "TRAIN_CHECKPOINT_EVERY": 0,
    "HINTS_ATTENTION_SEQUENCES": 0,
    "BENCH_SEQ_LENGTH": 16,
}


def write_config(folder: Path, **symbols: Any) -> Path:
    """Write the .config of a tiny run; its text, cache and output lie below ``folder``."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir(parents=True)
        for index in range(30):
            text = f"def function_{index}(x):\n    return x + {index}\n" * 9
            (texts / f"{index}.py").write_text(text)
    values = {
        "DATA_FILES_GLOB": str(texts),
        "DATA_CACHE_DIR": str(folder / "cache"),
        "RUN_OUTPUT_DIR": str(folder / "runs"),
        **_SYMBOLS,
        **symbols,
    }
    if "GPT2_PRETRAINED" in symbols:  # it brings its own sizes, and Kconfig refuses idle settings
        for name in ("LAYERS", "HEADS", "WIDTH", "VOCAB_SIZE"):
            del values[f"GPT2_{name}"]
    path = folder / f"{values['RUN_NAME']}.config"
    path.write_text("".join(f"CONFIG_{name}={_kconfig(value)}\n" for name, value in values.items()))
    return path


def tiny_config(folder: Path, **symbols: Any) -> tuple[Config, Path]:
    """Return the configuration of ``write_config`` and its path."""
    path = write_config(folder, **symbols)
    return load_config(path), path


def read_tensors(checkpoint: Path) -> dict[str, Any]:
    """Return weights and optimizer state of a checkpoint in one map."""
    return {
        **load_file(checkpoint / "model.safetensors"),
        **load_file(checkpoint / "optimizer.safetensors"),
    }


def _kconfig(value: Any) -> str:
    if isinstance(value, bool):
        return "y" if value else "n"
    return f'"{value}"' if isinstance(value, str) else str(value)
