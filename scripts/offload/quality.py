"""What compressed weights do to a trained model: perplexity and KL on its held-out text.

python -m scripts.offload.quality REQUEST.json
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

PRECISIONS = ("int8", "int4")
NUM_TOKENS = 8192
"""Held-out tokens read, at most."""
LENGTH = 128


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    result = measure_quality(Path(request["checkpoint"]), Path(request["folder"]))
    Path(request["result"]).write_text(json.dumps(result))


@torch.no_grad()
def measure_quality(checkpoint: Path, spill_dir: Path) -> dict[str, Any]:
    """Return perplexity, and mean KL(full || ours) in nats per token, of each precision."""
    from lib.tiering import attach
    from scripts.inputs import load_heldout, load_model

    model = load_model(str(checkpoint))
    config = model.config.get_text_config()
    length = min(LENGTH, config.max_position_embeddings)
    text = load_heldout(str(checkpoint), vocab_size=config.vocab_size, length=length)
    rows = [row[None] for row in text.tokens[: max(1, NUM_TOKENS // length)]]
    full = [_logits(model, row_1T) for row_1T in rows]
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "text": text.source,
        "tokens": len(rows) * (length - 1),
        "full": {
            "perplexity": _perplexity([_loss(*pair) for pair in zip(full, rows, strict=True)])
        },
    }
    for precision in PRECISIONS:
        losses, divergences = [], []
        with attach(
            model,
            hints=None,
            budget={"HBM": None, "SSD": None},
            precision=precision,
            mode="real",
            spill_dir=spill_dir,
        ):
            for row_1T, full_TV in zip(rows, full, strict=True):
                ours_TV = _logits(model, row_1T)
                losses.append(_loss(ours_TV, row_1T))
                divergences.append(_mean_kl(full_TV, ours_TV))
        result[precision] = {
            "perplexity": _perplexity(losses),
            "kl_nats": statistics.mean(divergences),
        }
    return result


def _logits(model: Any, row_1T: Tensor) -> Tensor:
    logits_TV: Tensor = model(row_1T, use_cache=False).logits[0].float()
    return logits_TV


def _loss(logits_TV: Tensor, row_1T: Tensor) -> float:
    """Return the mean next-token loss in nats."""
    return functional.cross_entropy(logits_TV[:-1], row_1T[0, 1:]).item()


def _perplexity(losses: Sequence[float]) -> float:
    """Rows are of one length, so that the mean of their means is the mean over tokens."""
    return math.exp(statistics.mean(losses))


def _mean_kl(full_TV: Tensor, ours_TV: Tensor) -> float:
    log_p, log_q = (functional.log_softmax(x.double(), -1) for x in (full_TV, ours_TV))
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


if __name__ == "__main__":
    main()
