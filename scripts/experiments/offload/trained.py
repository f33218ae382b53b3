"""A trained model in the place of random weights: what is accepted of a draft means something."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.kconfig import ROOT

_QUESTION = "Tell me a long story about a small village and a dragon."


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """SmolLM2-135M-Instruct in fp32, as ``make demo`` has it; a ``Shape`` as far as is asked."""

    family: str
    dtype: str
    vocab_size: int
    weight_bytes: int
    seed: int = 0
    hints: str
    """In the checkout."""
    prompt: Sequence[int] = field(repr=False)

    def num_bytes(self) -> int:
        """Return the bytes of the weights."""
        return self.weight_bytes


def find_trained() -> tuple[Path, TrainedModel]:
    """Return the checkpoint's folder, made where it isn't there, and what it is."""
    from scripts.demo import HINTS, prepare_model

    folder = prepare_model(ROOT / "runs" / "demo")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION}], add_generation_prompt=True, return_dict=True
    )
    config = json.loads((folder / "config.json").read_text())
    return folder, TrainedModel(
        family=config["model_type"],
        dtype="float32",
        vocab_size=config["vocab_size"],
        weight_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        hints=str(HINTS.relative_to(ROOT)),
        prompt=tuple(encoded["input_ids"]),
    )
