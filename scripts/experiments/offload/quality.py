"""What compressed weights do to a trained model: perplexity and KL on its held-out text.

python -m scripts.experiments.offload.quality REQUEST.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

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
    from lib.checkpoint.models import load_model
    from lib.precision.quality import QualityMeter
    from lib.signals.summary import causal_logits
    from lib.text.held_out import load_heldout
    from lib.tiering import attach

    model = load_model(str(checkpoint))
    config = model.config.get_text_config()
    length = min(LENGTH, config.max_position_embeddings)
    text = load_heldout(str(checkpoint), vocab_size=config.vocab_size, length=length)
    rows = [row[None] for row in text.tokens[: max(1, NUM_TOKENS // length)]]
    full = [causal_logits(model, row_1T) for row_1T in rows]
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "text": text.source,
        "tokens": len(rows) * (length - 1),
    }
    for precision in PRECISIONS:
        meter = QualityMeter()
        with attach(
            model,
            hints=None,
            budget={"HBM": None, "SSD": None},
            precision=precision,
            mode="real",
            spill_dir=spill_dir,
        ):
            for row_1T, full_1TV in zip(rows, full, strict=True):
                meter.add(row_1T, full_1TV, causal_logits(model, row_1T))
        quality = meter.result()
        result["full"] = {"perplexity": quality.reference_perplexity}
        result[precision] = {"perplexity": quality.perplexity, "kl_nats": quality.kl_nats}
    return result


if __name__ == "__main__":
    main()
