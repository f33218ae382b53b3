"""plan() says what attach() does, for whatever budget: the same plan, or the same refusal."""

import json
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lib.blocks import parameter_digest, partition_model, storage_bytes
from lib.codecs.kernels import kernel_name
from lib.commands import plan as plan_command
from lib.commands.cli import run_main
from lib.errors import InputError, PlacementError
from lib.hints import BlockHint, Hints, ModelInfo, build_hints, save_hints
from lib.machine import UNMEASURED, MachineProfile, TierSpec, save_machine
from lib.policy.plan import Plan
from lib.tiering import EmulationSpec, Planned, attach, empty_weights, load, plan
from lib.vocabulary import Precision, Tier

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 300,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_layer=3,
            n_embd=64,
            n_head=4,
            vocab_size=300,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)),
}
CASES = 20


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param]().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Norms are no smaller when compressed, which is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_memory(folder: Path) -> Any:
    return load(folder).__class__.from_pretrained(folder)


def make_hints(model: nn.Module) -> Hints:
    """Curves and tiers that are arbitrary, but always the same."""
    nats = {"int8": 1e-5, "int6": 1e-4, "int5": 1e-3, "int4": 4e-3, "int3": 2e-2, "int2": 0.1}
    blocks = partition_model(model)
    made = build_hints(
        model=ModelInfo(
            id="toy",
            revision="",
            class_name=type(model).__name__,
            parameter_digest=parameter_digest(model),
        ),
        provenance={"signal": "adam_exp_avg_sq", "created": "2026-01-01T00:00:00+00:00"},
        num_bytes={block.name: block.num_bytes for block in blocks},
        num_params={block.name: block.num_params for block in blocks},
        density={block.name: rank % 7 + 1.0 for rank, block in enumerate(blocks)},
        signals={block.name: {} for block in blocks},
        reasons={},
        hbm_threshold=0.4,
        cpu_threshold=0.7,
    )
    curves = {
        block.name: {Precision(name): value / (1 + rank % 7) for name, value in nats.items()}
        for rank, block in enumerate(blocks)
    }
    return replace(
        made,
        blocks={
            name: replace(hint, kl=curves[name], floor=Precision.INT3)
            for name, hint in made.blocks.items()
        },
        quality={
            "epsilon_kl": 0.05,
            "calibrated": True,
            "conformal_factor": 1.3,
            "conformal_probes": 60,
            "kernels": {"name": kernel_name("cpu", torch.float32), "nats": 1e-6},
        },
    )


def make_machine(rng: random.Random) -> MachineProfile:
    tiers = {
        Tier.HBM: TierSpec("HBM", 1.0, 20.0),
        Tier.SSD: TierSpec("disk", rng.uniform(1, 200), rng.uniform(0.2, 10)),
    }
    compute = {"fp32": rng.uniform(1e7, 1e10)}
    return MachineProfile(name="random", tiers=tiers, compute=compute, measured=True)


def make_case(rng: random.Random, size: int, number: int) -> dict[str, Any]:
    """Return arguments of plan and attach. Budgets are from far too small to plenty."""
    budget: dict[str, Any] = {"HBM": int(size * rng.uniform(0.1, 1.1) ** 2)}
    below = rng.choice(["none", "any", "any", "some"])
    if below != "none":
        budget["SSD"] = None if below == "any" else int(size * rng.uniform(0.3, 1.5))
    held = ({}, {"precision": "int8"}, {"precision": "int4"}, {"epsilon": 0.05})[number % 4]
    return {"budget": budget, **held, "machine": make_machine(rng)}


def outcome(ask: Callable[..., Any], *given: Any, **case: Any) -> Plan | str:
    """Return the plan of plan or attach, or why there is none."""
    try:
        made = ask(*given, **case)
    except (InputError, PlacementError) as error:
        return str(error)
    if not isinstance(made, Planned):
        with made:
            return made.plan
    return made.plan


def test_plan_and_attach_agree_on_any_budget(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(folder.name)
    model = in_memory(folder)
    hints = make_hints(model)
    save_hints(hints, tmp_path / "hints.json")
    size = storage_bytes(model.parameters())
    outcomes: list[Plan | str] = []
    for number in range(CASES):
        case = make_case(rng, size, number)
        given = hints if "epsilon" in case or rng.random() < 0.5 else None
        planned = outcome(plan, model, given, **case)
        assert planned == outcome(attach, model, given, **case), case

        lazily = outcome(plan, folder, given, **case)
        attached = outcome(attach, load(folder), given, weights=folder, **case)
        assert lazily == attached, case
        outcomes += [planned, lazily]

        told = ask_command(folder, None if given is None else tmp_path, case, capsys)
        if isinstance(attached, str):
            assert told["error"] == attached
        else:
            assert told["plan"] == attached.to_json()
            assert told["predicted"]["ms_per_token"] == attached.predicted.seconds * 1e3 > 0
            assert told["smallest_hbm_bytes"] <= attached.fast_bytes
    refused = sum(isinstance(each, str) for each in outcomes)
    assert CASES / 4 < refused < CASES * 7 / 4, "the cases say little"


def ask_command(
    folder: Path, hints: Path | None, case: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Return the document of `tierhints plan`, or what it says of wrong input."""
    machine = folder.parent / "machine.json"
    save_machine(case["machine"], machine)
    budget = ",".join(f"{tier}={size or ''}" for tier, size in case["budget"].items())
    flags = ["--model", str(folder), "--machine", str(machine), "--budget", budget]
    flags += ["--device", "cpu"]
    for name in ("precision", "epsilon"):
        flags += [f"--{name}", str(case[name])] if name in case else []
    if hints is not None:
        flags += ["--tier-hints", str(hints / "hints.json")]
    capsys.readouterr()  # of what loaded the model before
    code = run_main(lambda: plan_command.main(flags))
    printed, errors = capsys.readouterr()
    if code == 0:
        document: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return document
    return {"error": errors.strip().removeprefix("error: ")}


def test_plan_and_attach_agree_by_hints_alone_and_in_emulation(folder: Path) -> None:
    model = in_memory(folder)
    hints = make_hints(model)
    some = {"HBM": storage_bytes(model.parameters()) // 2, "CXL": None}
    for case in (
        {"hints": hints},
        {"hints": hints, "precision": "int4"},
        {"hints": hints, "mode": "emulated"},
        {"budget": some, "mode": "emulated"},
        {"budget": some, "mode": "emulated", "emulation": EmulationSpec(specs={})},
        {"budget": {"HBM": "1GiB", "PEER": None}},
    ):
        planned = outcome(plan, model, **case)
        assert planned == outcome(attach, model, **case), case
        assert planned == outcome(plan, model, **case), case
    assert isinstance(planned, str) and "real mode has no PEER tier" in planned


def test_originals_need_room_where_nothing_else_has_them(folder: Path) -> None:
    model, case = in_memory(folder), {"budget": {"HBM": "1GiB"}, "precision": "int4"}
    for ask in (plan, attach):
        with pytest.raises(InputError, match="a place for the originals"):
            ask(model, **case)
    assert plan(folder, **case).plan.original_bytes == 0
    assert plan(load(folder), **case).plan == plan(folder, **case).plan
    roomy = plan(model, budget={"HBM": "1GiB", "SSD": None}, precision="int4").plan
    assert roomy.original_bytes > 0


def test_a_folder_with_a_configuration_alone_is_planned(tmp_path: Path) -> None:
    GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=300).save_pretrained(tmp_path)
    planned = plan(tmp_path, budget={"HBM": "1MiB", "SSD": None}, precision="int8")
    assert planned.plan.original_bytes == 0
    smallest = planned.smallest_hbm_bytes
    assert smallest is not None
    at_least = plan(tmp_path, budget={"HBM": smallest, "SSD": None}, precision="int8")
    assert at_least.plan.fast_bytes <= smallest
    with pytest.raises(InputError, match="is too small"):
        plan(tmp_path, budget={"HBM": smallest - 1, "SSD": None}, precision="int8")
    assert (at_least.limit_seconds or 0) <= at_least.plan.predicted.seconds
    with pytest.raises(InputError, match="weights has no effect"):
        plan(tmp_path, budget={"HBM": "1MiB"}, weights=tmp_path)


def test_nothing_is_moved_and_nothing_is_left_on_the_model(folder: Path) -> None:
    model = in_memory(folder)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    plan(model, budget={"HBM": storage_bytes(model.parameters()) // 2, "SSD": None})
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    with attach(model, budget={"HBM": "1GiB"}), pytest.raises(PlacementError, match="attached"):
        plan(model, budget={"HBM": "1GiB"})


def test_a_plan_for_a_gpu_needs_none(folder: Path) -> None:
    budget = {"HBM": "1GiB", "CPU": "1GiB"}
    planned = plan(folder, budget=budget, device="cuda")
    assert planned.device.type == "cuda" and Tier.CPU in planned.plan.budget
    with pytest.raises(InputError, match="no place to compute"):
        plan(folder, budget=budget, device="meta")
    with pytest.raises(InputError, match="can't be used"):
        plan(folder, budget=budget, device="abacus")


def test_the_machine_that_was_probed_is_planned_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_memory(folder)
    case = {"budget": {"HBM": storage_bytes(model.parameters()) // 2, "SSD": None}}
    assert plan(model, **case).machine is UNMEASURED
    here = make_machine(random.Random(1))
    save_machine(here, tmp_path / "here.json")
    monkeypatch.setenv("TIERHINTS_MACHINE", str(tmp_path / "here.json"))
    planned = plan(model, **case)
    assert planned.machine == here
    with attach(model, **case) as runtime:
        assert runtime.plan == planned.plan
    assert planned.plan == plan(model, **case, machine=tmp_path / "here.json").plan
    emulated = plan(model, **case, mode="emulated")  # of a machine that isn't here
    assert emulated.emulation == EmulationSpec()
    assert plan(model, **case, mode="emulated", machine=here).emulation == EmulationSpec(
        specs=dict(here.tiers), charge_hbm=False
    )


def test_a_measurement_that_is_to_come_lets_blocks_go_below_three_bits() -> None:
    with empty_weights():
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    curve = {Precision.INT8: 1e-5, Precision.INT4: 1e-4, Precision.INT2: 1e-3}
    hints = Hints(
        blocks={block.name: BlockHint(tier=Tier.HBM, kl=curve) for block in partition_model(model)},
        quality={
            "calibrated": True,
            "conformal_factor": 1.2,
            "conformal_probes": 60,
            "kernels": {"name": kernel_name("cpu", torch.float32), "nats": 0.0},
        },
    )
    case = {"budget": {"HBM": "1GiB", "SSD": "1GiB"}, "epsilon": 0.1}
    held = plan(model, hints, **case, will_measure=True).plan.placements.values()
    assert {place.precision for place in held} == {Precision.INT2}
    held = plan(model, hints, **case).plan.placements.values()
    assert {place.precision for place in held} == {Precision.INT4}
    for ask, told in ((plan, {"will_measure": True}), (attach, {"measure": lambda: None})):
        with pytest.raises(InputError, match="measure has no effect"):
            ask(model, hints, budget={"HBM": "1GiB"}, **told)
