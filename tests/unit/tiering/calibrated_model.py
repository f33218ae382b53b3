"""A small model whose hints were measured, and a measure of what it costs to hold it so."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lib.blocks import partition_model
from lib.codecs.kernels import kernel_name
from lib.hints import BlockHint, Hints
from lib.policy.veto import Measure, Measured
from lib.precision.perturb import lossy_blocks
from lib.precision.quality import QualityMeter, measure_perturbations
from lib.tiering import Runtime
from lib.vocabulary import Precision, Tier

LADDER = [Precision.INT8, Precision.INT6, Precision.INT4, Precision.INT3, Precision.INT2]
BUDGET = {"HBM": "1GiB", "SSD": None}


@cache
def text() -> Tensor:
    return torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(1))


@cache
def model() -> GPT2LMHeadModel:
    """Large weights, so that precision costs something though nothing was learned."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=64,
        n_head=2,
        vocab_size=97,
        n_positions=32,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@cache
def calibrated(kernel_nats: float = 0.0) -> Hints:
    """Hints whose curves were measured, block by block."""
    pairs = [(block.name, p) for p in LADDER for block in lossy_blocks(model(), p)]
    measured = measure_perturbations(model(), [text()], [{name: p} for name, p in pairs])
    kl: dict[str, dict[Precision, float]] = {block.name: {} for block in partition_model(model())}
    for (name, precision), quality in zip(pairs, measured, strict=True):
        kl[name][precision] = quality.kl_nats
    return Hints(
        blocks={name: BlockHint(tier=Tier.HBM, kl=curve) for name, curve in kl.items()},
        quality={
            "calibrated": True,
            "conformal_factor": 1.2,
            "conformal_probes": 60,
            "kernels": {"name": kernel_name("cpu", torch.float32), "nats": kernel_nats},
        },
    )


def measure_of(reference: Tensor, running: GPT2LMHeadModel | None = None) -> Measure:
    """Measure the running model against the full one's logits."""
    network = running or model()

    def measure() -> Measured:
        meter = QualityMeter()
        with torch.inference_mode():
            meter.add(text(), reference, network(text()).logits)
        quality = meter.result()
        assert quality.kl_interval is not None
        return Measured(kl_nats=quality.kl_nats, upper_nats=quality.kl_interval[1])

    return measure


def reference() -> Tensor:
    full, tokens = model(), text()
    with torch.inference_mode():
        return full(tokens).logits.clone()


def precisions(runtime: Runtime) -> dict[str, Precision]:
    return {name: place.precision for name, place in runtime.plan.placements.items()}


def too_hopeful() -> Hints:
    """Hints whose predictions promise 50 times too much."""
    return replace(
        calibrated(),
        blocks={
            name: replace(hint, kl={p: kl / 50 for p, kl in hint.kl.items()})
            for name, hint in calibrated().blocks.items()
        },
    )
