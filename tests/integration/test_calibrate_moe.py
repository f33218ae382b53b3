"""Calibration of a mixture of experts, one of which no token is ever routed to."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lib.blocks import partition_model
from lib.evaluation.calibrate import CalibratedModel, calibrate_model, calibrated_hints
from lib.hints import BlockHint, Hints
from lib.precision.floors import read_trust
from lib.precision.sizes import stored_sizes
from lib.tiering import attach
from lib.vocabulary import Precision, Tier
from scripts.experiments.allocations.allocation_arms import hint_curves

IDLE = "model.layers.0.mlp.experts.3"
DIGEST = f"sha256:{'0' * 64}"


@cache
def model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    network = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=1,
            vocab_size=80,
            max_position_embeddings=32,
            initializer_range=0.1,
        )
    ).eval()
    with torch.no_grad():
        router = network.model.layers[0].mlp.gate.weight
        router[3] = (router[0] + router[1]) / 2  # never above both
    return network


@cache
def found() -> CalibratedModel:
    tokens = torch.randint(0, 80, (12, 24), generator=torch.Generator().manual_seed(1))
    return calibrate_model(
        model(), tokens[::2], tokens[1::2], folder="", hints=bare(), vocab_size=80, draws=32
    )


def bare() -> Hints:
    names = [block.name for block in partition_model(model())]
    return Hints(blocks={name: BlockHint(tier=Tier.HBM) for name in names})


@pytest.fixture(scope="module")
def hints() -> Hints:
    kernels = {"name": "cpu, fp32", "nats": 0.0}
    return calibrated_hints(bare(), found(), kernels=kernels, text={"digest": DIGEST})


def test_an_expert_without_a_token_has_no_curve(hints: Hints) -> None:
    assert list(found().unexercised) == hints.quality["unexercised"] == [IDLE]
    assert not hints.blocks[IDLE].kl and IDLE not in found().curves
    assert hints.blocks["model.layers.0.mlp.experts.1"].kl[Precision.INT4] > 0
    assert all(block != IDLE for block, _ in found().pairs)
    assert all(IDLE not in plan for plan in found().plans)
    assert all(quality.kl_nats > 0 for quality in found().measured)


def test_the_factor_is_of_use_since_routers_stay_raw(hints: Hints) -> None:
    routers = [f"model.layers.{layer}.mlp" for layer in (0, 1)]
    assert all(set(hints.blocks[name].kl.values()) == {0.0} for name in routers)
    assert read_trust(hints.quality).factor == hints.quality["conformal_factor"]
    assert hints.quality["trustworthy"] == (hints.quality["conformal_factor"] <= 5)


def test_an_idle_expert_stays_as_it_is_under_an_epsilon(hints: Hints) -> None:
    with attach(model(), hints, budget={"HBM": None, "SSD": None}, epsilon=1.0) as runtime:
        places = runtime.plan.placements
        assert places[IDLE].precision is Precision.FP32
        others = [place for name, place in places.items() if "experts" in name and name != IDLE]
        assert all(place.precision is not Precision.FP32 for place in others)


def test_its_curve_isnt_missed_by_comparisons(hints: Hints) -> None:
    sizes = stored_sizes(model())
    curves = hint_curves(hints, sizes, digest=DIGEST)
    assert curves is not None and curves.keys() == sizes.num_params.keys() - {IDLE}
    rest = stored_sizes(model(), names=curves)
    assert rest.num_params.keys() == curves.keys()
    assert rest.other_bytes > sizes.other_bytes
    assert hint_curves(hints, sizes, digest=f"sha256:{'1' * 64}") is None
    undeclared = replace(hints, quality={**hints.quality, "unexercised": []})
    assert hint_curves(undeclared, sizes, digest=DIGEST) is None
