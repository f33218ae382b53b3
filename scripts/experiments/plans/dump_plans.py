"""Dump what the runtime decides and computes for a fixed set of models and budgets, to compare two
versions of the code: outputs by digest, plans, predicted times and predicted KL.

    python scripts/experiments/plans/dump_plans.py --json before.json

A refactor leaves every line of the document as it was. Only the public API is used, so the script
runs on older versions too.
"""

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.blocks import partition_model
from lib.hints import BlockHint, Hints
from lib.tiering import EmulationSpec, attach

try:
    from lib.vocabulary import Precision, Tier
except ImportError:  # a version in which they were in another file
    from lib.hints import Precision, Tier  # type: ignore[attr-defined, no-redef]

SHARES = (1.2, 0.7, 0.45, 0.3)
"""Budgets, as shares of the model's bytes."""
PRECISIONS = (None, "int8", "int4", "int3")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Dump outputs, plans and predictions of fixed models and budgets."
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where it goes")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    document = {name: dump_model(make) for name, make in MODELS.items()}
    args.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    cases = sum(len(cases) for cases in document.values())
    print(f"{cases} cases of {len(document)} models: {args.json}", file=sys.stderr)
    return 0


def dump_model(make: Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]) -> dict[str, Any]:
    """Return what happens to a model in every case, by the case's name."""
    cases: dict[str, Any] = {}
    model, inputs = make()
    total = sum(parameter.nbytes for parameter in model.parameters())
    hints = make_hints(model)
    tiers = {name: ("HBM", "SSD")[rank % 2] for rank, name in enumerate(hints.blocks)}
    for share in SHARES:
        budget = {"HBM": int(total * share), "SSD": None}
        for precision in PRECISIONS:
            cases[f"{share} {precision}"] = dump_case(
                model, inputs, budget=budget, precision=precision
            )
        cases[f"{share} hints"] = dump_case(model, inputs, hints=hints, budget=budget)
        cases[f"{share} epsilon"] = dump_case(
            model, inputs, hints=hints, budget=budget, epsilon=0.05
        )
        cases[f"{share} emulated"] = dump_case(
            model, inputs, budget=budget, mode="emulated", emulation=EmulationSpec()
        )
    cases["tiers of the hints"] = dump_case(model, inputs, hints=tiers)
    return cases


def dump_case(model: nn.Module, inputs: dict[str, torch.Tensor], **arguments: Any) -> Any:
    """Attach, run twice, and return the plan, the bytes that moved and a digest of the output."""
    try:
        with torch.no_grad(), attach(model, **arguments) as runtime:
            first, again = digest(model(**inputs)), digest(model(**inputs))
            stats = runtime.stats()
            quality = runtime.veto.to_json()
            return {
                "output": first,
                "again": again,
                "plan": runtime.plan.to_json(),
                "predicted_seconds": runtime.plan.predicted.seconds,
                "quality": json.loads(json.dumps(quality, default=str)),
                "peak_resident_bytes": stats.peak_resident_bytes,
                "bytes_per_tier": stats.bytes_per_tier,
            }
    except Exception as error:  # older versions raise where newer ones compute
        return {"raised": f"{type(error).__name__}: {error}"}


def digest(output: Any) -> str:
    """Return a digest of the bits of an output's tensors."""
    tensors = [output] if isinstance(output, torch.Tensor) else list(output.values())
    sha = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def make_hints(model: nn.Module) -> Hints:
    """Return hints with importances and KL curves that are arbitrary, but always the same."""
    blocks = {}
    for rank, block in enumerate(partition_model(model), start=1):
        scale = 1e-3 / (1 + rank % 7)
        blocks[block.name] = BlockHint(
            tier=(Tier.HBM, Tier.CPU, Tier.SSD)[rank % 3],
            importance=1 / rank,
            kl={precision: scale * nats for precision, nats in KL_NATS.items()},
            floor=Precision.INT3,
        )
    return Hints(blocks=blocks, quality=QUALITY)


KL_NATS = {
    Precision.INT8: 1e-4,
    Precision.INT6: 1e-3,
    Precision.INT5: 5e-3,
    Precision.INT4: 0.02,
    Precision.INT3: 0.1,
    Precision.INT2: 0.5,
}
QUALITY = {
    "calibrated": True,
    "conformal_factor": 1.3,
    "exhaustive": True,
    "kernels": {"name": "made up", "nats": 1e-6},
}


def _sequential() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)) for _ in range(4)]
    return nn.Sequential(*layers).eval(), {"input": torch.randn(3, 128)}


def _transformer(kind: str, **config: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        settings = getattr(transformers, f"{kind}Config")(**config)
        heads = {"Bert": "BertModel", "T5": "T5ForConditionalGeneration"}
        name = heads.get(kind, f"{kind}ForCausalLM")
        if kind == "GPT2":
            name = "GPT2LMHeadModel"
        model = getattr(transformers, name)(settings).eval()
        ids = torch.arange(3, 27).view(2, 12)
        inputs = {"input_ids": ids}
        if kind == "T5":
            inputs["decoder_input_ids"] = ids
        return model, inputs

    return make


_LLAMA = {
    "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
MODELS = {
    "sequential": _sequential,
    "gpt2": _transformer("GPT2", vocab_size=1000, n_embd=128, n_layer=3, n_head=4, n_positions=64),
    "llama": _transformer("Llama", **_LLAMA),
    "llama tied": _transformer("Llama", **_LLAMA, tie_word_embeddings=True),
    "mixtral": _transformer("Mixtral", **_LLAMA, num_key_value_heads=4, num_local_experts=4),
    "t5": _transformer(
        "T5", vocab_size=1000, d_model=128, d_ff=256, d_kv=32, num_layers=2, num_heads=4,
    ),
    "bert": _transformer(
        "Bert", vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4,
    ),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
