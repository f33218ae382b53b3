import copy
from typing import Any

import pytest
import torch
from signal_models import Bigram, toy_lm, train
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lib.blocks import partition_model
from lib.errors import InputError
from lib.hints import Hints, hints_to_json
from lib.signals import AdamStateTierAnalyzer, MomentScale, adam_hints, collect_adam_signal
from lib.vocabulary import Tier

LAYER = "layers.0"


def trained(steps: int = 3, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = toy_lm()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], **options
    )
    train(model, optimizer, steps=steps)
    return model, optimizer


def make_hints(optimizer: torch.optim.Optimizer, model: nn.Module, **options: Any) -> Hints:
    given = {"model_id": "toy", "hbm_threshold": 0.3, "cpu_threshold": 0.8, **options}
    return adam_hints(optimizer, model, **given)


def squared_gradient_average(steps: int, beta2: float) -> dict[str, torch.Tensor]:
    """Compute v_hat by its definition, beside an AdamW that takes the same steps."""
    model, moments = toy_lm(), {}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, beta2))
    optimizer.register_step_pre_hook(
        lambda *_: moments.update(
            {
                name: beta2 * moments.get(name, 0) + (1 - beta2) * p.grad.double().square()
                for name, p in model.named_parameters()
            }
        )
    )
    train(model, optimizer, steps=steps)
    return {name: moment / (1 - beta2**steps) for name, moment in moments.items()}


def test_density_is_the_mean_of_the_bias_corrected_moment() -> None:
    expected = squared_gradient_average(steps=3, beta2=0.9)
    model, optimizer = trained(betas=(0.9, 0.9))
    signal = collect_adam_signal(optimizer, model)
    mlp = torch.cat([expected[f"{LAYER}.mlp.{name}"].flatten() for name in ("weight", "bias")])
    assert signal.density[f"{LAYER}.mlp"] == pytest.approx(mlp.mean().item(), rel=1e-5)
    assert signal.mass[f"{LAYER}.mlp"] == pytest.approx(mlp.sum().item(), rel=1e-5)
    assert (signal.step, signal.beta2, signal.uniform_steps) == (3, (0.9,), True)


def test_each_packed_expert_has_its_own_slice() -> None:
    expected = squared_gradient_average(steps=3, beta2=0.999)[f"{LAYER}.experts.weight"]
    model, optimizer = trained()
    signal = collect_adam_signal(optimizer, model)
    for expert in range(2):
        density = signal.density[f"{LAYER}.experts.{expert}"]
        assert density == pytest.approx(expected[expert].mean().item(), rel=1e-4)


def test_a_tied_weight_counts_once_and_all_bytes_are_covered() -> None:
    model, optimizer = trained()
    hints = make_hints(optimizer, model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(hint.num_params or 0 for hint in hints.blocks.values()) == total
    assert "head" not in hints.blocks and hints.blocks["embed"].importance is not None


def test_parameter_groups_are_corrected_by_their_own_beta2() -> None:
    model = toy_lm()
    embed, others = [model.embed.weight], [p for n, p in model.named_parameters() if n[0] != "e"]
    groups = [{"params": embed, "betas": (0.9, 0.5)}, {"params": others}]
    optimizer = torch.optim.AdamW(groups)
    train(model, optimizer)
    signal = collect_adam_signal(optimizer, model)
    one = squared_gradient_average(steps=3, beta2=0.5)["embed.weight"]
    assert signal.density["embed"] == pytest.approx(one.mean().item(), rel=1e-4)
    assert make_hints(optimizer, model).provenance["beta2"] == [0.5, 0.999]


def test_size_alone_makes_no_block_important() -> None:
    model = nn.ModuleDict({"small": nn.Linear(2, 2), "large": nn.Linear(64, 64)})
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()  # gradient 1 everywhere
    optimizer.step()
    blocks = make_hints(optimizer, model).blocks
    assert blocks["small"].importance == pytest.approx(blocks["large"].importance)
    assert blocks["large"].signals["adam_exp_avg_sq_sum"] == pytest.approx(4160)


def test_frozen_blocks_have_no_importance_and_say_what_to_do() -> None:
    model = toy_lm()
    model.layers[0].mlp.requires_grad_(False)
    model.layers[1].mlp.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    scaled = {"tokens_per_update": 12, "clip": 0}
    blocks = make_hints(optimizer, model, **scaled).blocks
    frozen, partly = blocks["layers.0.mlp"], blocks["layers.1.mlp"]
    assert (frozen.importance, frozen.rank, frozen.tier) == (None, None, Tier.SSD)
    assert "frozen" in frozen.reason and "tierhints collect" in frozen.reason
    assert partly.importance is not None and "36 trained of 42 weights" in partly.reason
    moment = optimizer.state[model.layers[1].mlp.weight]["exp_avg_sq"] / (1 - 0.999**3)
    assert partly.signals["adam_exp_avg_sq"] == pytest.approx(moment.mean().item(), rel=1e-5)
    assert "fisher_trace" not in partly.signals, "the rest of the block isn't in the sum"
    assert "fisher_trace" in blocks["embed"].signals


@pytest.mark.parametrize("part", ["layers.0.mlp", "layers.0", "embed", "layers.1.mlp.bias"])
def test_a_part_frozen_in_mid_training_keeps_the_moment_of_that_time(part: str) -> None:
    model = toy_lm()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=2)
    before = collect_adam_signal(optimizer, model)
    parameters = dict(model.named_parameters())
    frozen = {name for name in parameters if name.startswith(part)}
    for name in frozen:
        parameters[name].requires_grad_(False)
    train(model, optimizer, steps=3)
    with pytest.warns(UserWarning, match="reset, frozen, or had no gradient"):
        hints = make_hints(optimizer, model, tokens_per_update=12, clip=0)
    touched = {b.name for b in partition_model(model) for p in b.pieces if p.parameter in frozen}
    for name in touched:
        hint = hints.blocks[name]
        assert hint.importance is not None and "fisher_trace" not in hint.signals
        assert "frozen after 2 updates" in hint.reason and "no moment" not in hint.reason
        if part != "layers.1.mlp.bias":
            assert hint.signals["adam_exp_avg_sq"] == before.density[name]
    for name in hints.blocks.keys() - touched:
        assert "frozen" not in hints.blocks[name].reason
        assert "fisher_trace" in hints.blocks[name].signals


def test_nothing_to_read_says_why() -> None:
    model, optimizer = trained()
    with pytest.raises(InputError, match="holds no parameter of this model"):
        collect_adam_signal(optimizer, copy.deepcopy(model))
    with pytest.raises(InputError, match="no state .* after the first optimizer.step"):
        collect_adam_signal(torch.optim.AdamW(model.parameters()), model)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="every parameter is frozen.*tierhints collect"):
        collect_adam_signal(optimizer, model)


def test_weights_outside_the_optimizer_have_no_importance() -> None:
    model = toy_lm()
    optimizer = torch.optim.AdamW(model.layers.parameters())
    train(model, optimizer)
    assert "not in the optimizer" in make_hints(optimizer, model).blocks["embed"].reason


def test_a_moment_that_is_not_finite_is_an_error() -> None:
    model, optimizer = trained()
    optimizer.state[model.embed.weight]["exp_avg_sq"][0, 0] = float("nan")
    with pytest.raises(InputError, match="'embed.weight' isn't finite"):
        collect_adam_signal(optimizer, model)


def test_fsdp1_is_refused() -> None:
    class Wrapped(FullyShardedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self._fsdp_wrapped_module = module

        def __getattr__(self, name: str) -> Any:
            return nn.Module.__getattr__(self, name)

    model, optimizer = trained()
    with pytest.raises(InputError, match="FSDP1.*fully_shard"):
        collect_adam_signal(optimizer, Wrapped(model))


def test_provenance_records_what_scales_the_moment() -> None:
    model, optimizer = trained(amsgrad=True, fused=True)
    provenance = make_hints(
        optimizer,
        model,
        tokens_per_update=12,
        clip=1.0,
        mean_clip_sq=0.5,
        accumulation=4,
        world_size=2,
        global_step=3,
        extra_provenance={"corpus": "toy"},
    ).provenance
    expected = {
        "signal": "adam_exp_avg_sq",
        "optimizer": "AdamW",
        "foreign_optimizer": False,
        "implementation": "fused",
        "beta2": 0.999,
        "window_steps": 1000,
        "step": 3,
        "global_step": 3,
        "moments_reset": False,
        "uniform_steps": True,
        "bias_corrected": True,
        "amsgrad": True,
        "weight_decay_in_moment": False,
        "moment_dtype": "float32",
        "dtype": "float32",
        "clip": 1.0,
        "mean_clip_sq": 0.5,
        "tokens_per_update": 12,
        "accumulation": 4,
        "world_size": 2,
        "fisher_trace": "estimated from the moment",
        "corpus": "toy",
    }
    assert expected.items() <= provenance.items()


def test_amsgrad_reads_the_average_and_not_the_maximum() -> None:
    plain, with_maximum = (
        collect_adam_signal(*reversed(trained(amsgrad=amsgrad))) for amsgrad in (False, True)
    )
    assert with_maximum.amsgrad and with_maximum.mass["embed"] == pytest.approx(
        plain.mass["embed"], rel=1e-3
    )


def test_the_fisher_trace_is_the_scaled_mass() -> None:
    model, optimizer = trained()
    hints = make_hints(optimizer, model, tokens_per_update=12, clip=0.5, mean_clip_sq=0.25)
    for hint in hints.blocks.values():
        mass = hint.signals["adam_exp_avg_sq_sum"]
        assert hint.signals["fisher_trace"] == pytest.approx(mass * 12 / 0.25)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"clip": 0}, "tokens per update unknown"),
        ({"tokens_per_update": 12, "clip": 1.0}, "clip coefficient unknown"),
        ({"tokens_per_update": 12}, "clip coefficient unknown"),
    ],
)
def test_no_fisher_trace_without_its_scale(options: dict[str, Any], reason: str) -> None:
    model, optimizer = trained()
    hints = make_hints(optimizer, model, **options)
    assert reason in hints.provenance["fisher_trace"]
    assert all("fisher_trace" not in hint.signals for hint in hints.blocks.values())


@pytest.mark.parametrize(
    "options", [{"tokens_per_update": 0}, {"mean_clip_sq": 1.5}, {"clip": -1.0}]
)
def test_impossible_scales_are_refused(options: dict[str, Any]) -> None:
    model, optimizer = trained()
    with pytest.raises(InputError, match=next(iter(options))):
        make_hints(optimizer, model, **options)


@pytest.mark.parametrize(("decoupled", "coupled"), [(False, True), (True, False)])
def test_weight_decay_inside_the_moment_is_recorded(decoupled: bool, coupled: bool) -> None:
    model = toy_lm()
    optimizer = torch.optim.Adam(
        model.parameters(), weight_decay=0.1, decoupled_weight_decay=decoupled
    )
    train(model, optimizer)
    if coupled:
        with pytest.warns(UserWarning, match="weight decay"):
            hints = make_hints(optimizer, model, tokens_per_update=12, clip=0)
    else:
        hints = make_hints(optimizer, model, tokens_per_update=12, clip=0)
    assert hints.provenance["weight_decay_in_moment"] is coupled
    assert ("fisher_trace" in hints.blocks["embed"].signals) is not coupled


def test_moments_reset_during_training_are_detected() -> None:
    model, optimizer = trained(steps=4)
    with pytest.warns(UserWarning, match="4 updates of 9 steps"):
        hints = make_hints(optimizer, model, tokens_per_update=12, clip=0, global_step=9)
    assert hints.provenance["moments_reset"] is True
    assert "reset" in hints.provenance["fisher_trace"]
    del optimizer.state[model.layers[0].mlp.weight]
    train(model, optimizer, steps=1)
    with pytest.warns(UserWarning, match=r"1 blocks \(layers.0.mlp, ...\).*fewer than 5"):
        hints = make_hints(optimizer, model, tokens_per_update=12, clip=0)
    assert hints.provenance["uniform_steps"] is False
    assert "fisher_trace" not in hints.blocks["layers.0.mlp"].signals
    assert "fisher_trace" in hints.blocks["layers.1.mlp"].signals


def test_half_precision_moments_warn_and_give_no_scale() -> None:
    model = toy_lm().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    with pytest.warns(UserWarning, match="bfloat16"):
        hints = make_hints(optimizer, model, tokens_per_update=12, clip=0)
    assert "bfloat16" in hints.provenance["fisher_trace"]


def test_hints_are_a_valid_document_and_extra_signals_are_kept() -> None:
    model, optimizer = trained()
    extra = {"layers.0.mlp": {"attention_fim_trace": [0.5, 0.75]}}
    hints = make_hints(optimizer, model, revision="step-3", extra_signals=extra)
    document = hints_to_json(hints)
    assert document["blocks"]["layers.0.mlp"]["signals"]["attention_fim_trace"] == [0.5, 0.75]
    assert document["model"]["class"] == "ToyLM" and document["model"]["revision"] == "step-3"
    with pytest.raises(InputError, match="'nowhere': no such block"):
        make_hints(optimizer, model, extra_signals={"nowhere": {}})


def test_the_analyzer_gives_tiers_by_cumulative_bytes() -> None:
    model, optimizer = trained()
    sizes = {block.name: block.num_bytes for block in partition_model(model)}
    density = collect_adam_signal(optimizer, model).density
    assert AdamStateTierAnalyzer().hbm_threshold == 0.4
    tiers = AdamStateTierAnalyzer(hbm_threshold=0.3, cpu_threshold=0.8).analyze_optimizer_states(
        optimizer, model
    )
    assert tiers.keys() == sizes.keys()
    order = sorted(tiers, key=lambda name: -(density[name] or 0))
    assert [tiers[name] for name in order] == sorted(tiers.values(), key=list(Tier).index)
    share = sum(sizes[name] for name, tier in tiers.items() if tier is Tier.HBM)
    assert abs(share / sum(sizes.values()) - 0.3) < 0.2
    everything = AdamStateTierAnalyzer(hbm_threshold=1, cpu_threshold=1)
    assert set(everything.analyze_optimizer_states(optimizer, model).values()) == {Tier.HBM}


@pytest.mark.parametrize("thresholds", [(0.8, 0.3), (-0.1, 0.5), (0.5, 1.5), (float("nan"), 1)])
def test_the_analyzer_refuses_bad_thresholds(thresholds: tuple[float, float]) -> None:
    with pytest.raises(InputError):
        AdamStateTierAnalyzer(hbm_threshold=thresholds[0], cpu_threshold=thresholds[1])


def test_the_scaled_moment_estimates_the_fisher_information() -> None:
    """With labels from the model itself, clipping and changing batches, F = v_hat B / c^2."""
    torch.manual_seed(0)
    model = Bigram(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999))
    scale = MomentScale(0.999)
    probabilities = model.table.weight.detach().softmax(-1)
    for step in range(400):
        ids = torch.randint(0, 8, (40 + 40 * (step % 3),))
        labels = torch.multinomial(probabilities[ids], 1).squeeze(1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), labels).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()
        optimizer.step()
        scale.update(tokens=len(ids), clip_coefficient=min(1.0, 0.05 / (norm + 1e-6)))
    values = scale.values(400)
    assert values is not None and values[1] < 0.6, "clipping was active"
    hints = make_hints(
        optimizer, model, tokens_per_update=values[0], clip=0.05, mean_clip_sq=values[1]
    )
    exact = (probabilities * (1 - probabilities)).sum().item() / 8
    # A large gradient is clipped more, so <c^2 g^2> lies below <c^2> <g^2>: by 6 % with 64 weights.
    assert hints.blocks["table"].signals["fisher_trace"] == pytest.approx(exact, rel=0.1)
