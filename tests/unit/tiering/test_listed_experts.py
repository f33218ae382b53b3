"""Experts that are modules of a list, one by one: the same bits as the whole model's, within any
budget, and the counters of the simulator's cache.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_budgets import (
    IDS,
    budget_for,
    expert_bytes,
    make_hints,
    outputs,
    same,
    slots_of,
)
from safetensors.torch import save_file
from tiny_models import ListedMoe, tiny_listed_moe, tiny_qwen_moe
from torch import nn

from lib.blocks import BlockKind, partition_model
from lib.errors import PlacementError
from lib.policy.experts import POLICIES, ExpertCache
from lib.tiering import attach, empty_weights, plan
from lib.tiering.residency.listed import ListedExperts
from lib.tiering.stores.file import FileStore
from lib.vocabulary import Precision


@pytest.fixture(params=[False, True], ids=["called", "all called"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_listed_moe(calls_all=request.param).eval()


def expert_names(model: nn.Module) -> list[str]:
    return [block.name for block in partition_model(model) if block.kind is BlockKind.EXPERT]


def test_bits_are_those_of_the_whole_model_within_any_budget(model: Any) -> None:
    expected = outputs(model)
    given = {name: value.detach().clone() for name, value in model.named_parameters()}
    for share in (0.3, 0.6):
        budget = budget_for(model, share)
        with attach(model, budget=budget) as runtime:
            assert runtime.plan.cache_bytes
            assert same(outputs(model), expected)
            assert runtime.stats().peak_resident_bytes <= budget["HBM"]
            assert runtime._keeper.residency.resident_bytes() <= budget["HBM"]
            state = model.state_dict()
            assert all(torch.equal(state[name], value) for name, value in given.items())
        assert not any("_call_impl" in vars(each) for each in model.modules())
        assert all(torch.equal(value, given[name]) for name, value in model.named_parameters())
    assert same(outputs(model), expected)


def test_only_what_is_routed_to_is_read(model: Any) -> None:
    with attach(model, budget=budget_for(model, 0.5)) as runtime, torch.no_grad():
        for _ in range(2):
            model(IDS[:1, :1])  # whose experts are there by now
        runtime.reset_stats()
        model(IDS[:1, :1])
        stats = runtime.stats()
        assert stats.experts is not None
        assert (stats.experts.uses, stats.experts.reads) == (4, 0)
        assert stats.experts.ready == stats.experts.resident == 4
        calls = {name: stats.blocks[name].calls for name in expert_names(model)}
        assert sum(calls.values()) == 4
        assert not any(stats.blocks[name].bytes_moved for name in calls)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_simulator_counts_what_the_engine_counts(model: Any, policy: str, share: float) -> None:
    mixtures: list[ListedMoe] = [layer.mlp for layer in model.model.layers]
    with attach(model, budget=budget_for(model, share)) as runtime, torch.no_grad():
        slots = slots_of(runtime)
        slots.policy = policy
        outputs(model)  # the plan may change after a forward
        slots.free()
        slots.adopt(runtime.plan)
        assert slots.cache is not None
        runtime.reset_stats()
        for mixture in mixtures:
            mixture.routed.clear()
        for prompt in IDS:
            model.generate(prompt[None, :5], max_new_tokens=16, do_sample=False, pad_token_id=0)
        engine = slots.cache.counters
        cache = ExpertCache(
            slots.cache.sizes,
            slots.cache.capacity_bytes,
            per_token={0: 2, 1: 2},
            policy=policy,
            counts={} if policy == "popularity" else None,
            spare=policy == "ours",
        )
        stats = runtime.stats().experts
    for calls in zip(*(mixture.routed for mixture in mixtures), strict=True):
        for layer, tokens in enumerate(calls):
            asked = sorted({expert for token in tokens for expert in token})
            for place, expert in enumerate(asked):  # as the layer calls them
                cache.use(layer, [expert], goes_on=place > 0)
    assert engine.misses > 0
    assert engine.hits > 0 or share == 0.2  # below what a token uses
    assert cache.counters == engine
    assert stats is not None
    assert (stats.resident, stats.reads, stats.predicted) == (engine.hits, engine.misses, 0)


def test_a_prompt_does_not_push_out_what_decoding_uses() -> None:
    model = tiny_listed_moe().eval()
    with attach(model, budget=budget_for(model, 0.6)) as runtime, torch.no_grad():
        for _ in range(8):
            model(IDS[:1, :1])
        cache = slots_of(runtime).cache
        assert cache is not None
        used = [
            (layer, expert)
            for layer, each in enumerate(model.model.layers)
            for expert in each.mlp.routed[-1][0]
        ]
        model(IDS)  # 40 tokens, which ask for all experts
        assert cache.counters.prompt_reads > 0
        assert all(expert in cache for expert in used)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_compressed_experts_compute_the_same_from_below(model: Any, precision: str) -> None:
    found = []
    whole = budget_for(model, 2.0)
    least = plan(model, budget=whole, precision=precision).smallest_hbm_bytes
    assert least is not None
    for budget in (whole, {**whole, "HBM": int(least * 1.02)}):
        with attach(model, budget=budget, precision=precision) as runtime:
            found.append(outputs(model))
            below = any(each.is_below for each in runtime._keeper.residency.listed)
            assert below == (budget is not whole)
    assert same(*found)


def test_each_expert_has_a_precision_and_a_floor_of_its_own() -> None:
    model = tiny_listed_moe().eval()
    names = expert_names(model)
    hints = make_hints(model, floor={names[1]: Precision.INT8})
    precision = {name: ("int4" if index % 2 else "int8") for index, name in enumerate(names[2:])}
    precision |= {names[1]: "int4"}
    for share in (2.0, 0.3):
        with attach(model, hints, budget=budget_for(model, share), precision=precision) as runtime:
            outputs(model)
            held = {name: str(runtime.plan.placements[name].precision) for name in names}
        assert held[names[0]] == "fp32"
        assert held[names[1]] == "int8"  # its floor
        assert [held[name] for name in names[2:4]] == ["int8", "int4"]


@pytest.mark.parametrize("make", [tiny_listed_moe, tiny_qwen_moe])
def test_a_layer_s_experts_have_a_precision_by_their_common_name(make: Any) -> None:
    model = make().eval()
    experts = "model.layers.0.mlp.experts"
    precision = {experts: "int8", f"{experts}.3": "int4"}
    placements = plan(model, budget=budget_for(model, 2.0), precision=precision).plan.placements
    held = {name: str(place.precision) for name, place in placements.items()}
    assert {held.pop(f"{experts}.{number}") for number in (0, 1, 2, 4, 5, 6, 7)} == {"int8"}
    assert held.pop(f"{experts}.3") == "int4"
    assert set(held.values()) == {"fp32"}


def test_a_budget_changes_while_attached_and_while_it_runs() -> None:
    model = tiny_listed_moe().eval()
    expected = outputs(model)
    with attach(model, budget=budget_for(model, 0.3)) as runtime:
        for share in (2.0, 0.3, 0.8, 0.3, 2.0):
            runtime.budget = budget_for(model, share)
            assert bool(runtime.plan.cache_bytes) == (share < 1)
            assert same(outputs(model), expected)
            assert runtime._keeper.residency.resident_bytes() <= runtime.budget["HBM"]


def test_a_checkpoint_is_read_expert_by_expert(tmp_path: Path) -> None:
    model = tiny_listed_moe().eval()
    expected = outputs(model)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    with empty_weights():
        empty = tiny_listed_moe().eval()
    with attach(empty, budget=budget_for(model, 0.4), weights=tmp_path) as runtime:
        assert same(outputs(empty), expected)
        runtime.budget = budget_for(model, 2.0)
        assert same(outputs(empty), expected)


def test_the_cache_begins_with_what_training_has_routed_to() -> None:
    model = tiny_listed_moe().eval()
    counts = {
        name: {"router_counts": 1000 if index % 8 == 5 else 1}
        for index, name in enumerate(expert_names(model))
    }
    hints = make_hints(model, signals=counts)
    with attach(model, hints, budget=budget_for(model, 0.3)) as runtime:
        cache = slots_of(runtime).cache
        assert cache is not None
        assert {(0, 5), (1, 5)} <= set(cache.experts())


def test_emulation_charges_what_is_routed_to(model: Any) -> None:
    expected = outputs(model)
    with attach(model, budget=budget_for(model, 0.3), mode="emulated") as runtime:
        assert same(outputs(model), expected)
        stats = runtime.stats()
        assert stats.experts is not None
        reads = stats.experts.reads + stats.experts.prompt_reads
        moved = sum(stats.blocks[name].bytes_moved for name in expert_names(model))
    assert moved == expert_bytes(model) // 16 * reads


@pytest.mark.parametrize("fails", ["read", "interrupt"])
def test_what_fails_in_a_use_leaves_a_model_that_computes(
    model: Any, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outputs(model)
    with attach(model, budget=budget_for(model, 0.2)) as runtime:
        count = iter(range(10_000))
        if fails == "read":
            read = FileStore.read_into

            def broken(store: FileStore, key: str, start: int, out: torch.Tensor) -> None:
                if next(count) % 5 == 4:
                    raise PlacementError(f"payload {key} is damaged")
                read(store, key, start, out)

            with monkeypatch.context() as patch:
                patch.setattr(FileStore, "read_into", broken)
                with pytest.raises(PlacementError, match="damaged"):
                    outputs(model)
        else:

            def interrupted(module: nn.Module, args: Any) -> None:
                if next(count) == 3:
                    raise KeyboardInterrupt

            hooks = [
                each.experts[number].w2.register_forward_pre_hook(interrupted)
                for each in (layer.mlp for layer in model.model.layers)
                for number in range(8)
            ]
            with pytest.raises(KeyboardInterrupt):
                outputs(model)
            for hook in hooks:
                hook.remove()
        assert same(outputs(model), expected)
        assert runtime.stats().peak_resident_bytes <= runtime.budget["HBM"]
    assert same(outputs(model), expected)


def test_a_view_that_was_kept_is_never_overwritten() -> None:
    model = tiny_listed_moe().eval()
    given = {name: value.detach().clone() for name, value in model.named_parameters()}
    kept: dict[str, torch.Tensor] = {}
    with attach(model, budget=budget_for(model, 0.2)), torch.no_grad():
        for number, expert in enumerate(model.model.layers[0].mlp.experts):

            def keep(module: Any, args: Any, output: Any, number: int = number) -> None:
                kept[f"model.layers.0.mlp.experts.{number}.w1.weight"] = module.weight.view(-1)

            expert.w1.register_forward_hook(keep)
        model(IDS)
        model(IDS)
        assert len(kept) > 3
        for name, view in kept.items():
            assert torch.equal(view, given[name].view(-1))


def test_weights_that_are_taken_without_a_call() -> None:
    model = tiny_listed_moe().eval()
    first, second, *_ = model.model.layers[0].mlp.experts
    expected = first.w1.weight.detach().square()
    both = torch.stack([first.w1.weight.detach(), second.w1.weight.detach()])
    with torch.no_grad(), attach(model, budget=budget_for(model, 0.3)):
        assert torch.equal(first.w1.weight.square(), expected)
        with pytest.raises(PlacementError, match="one at a time"):
            torch.stack([first.w1.weight, second.w1.weight])
        assert torch.equal(first.w1.weight.square(), expected)
    assert torch.equal(torch.stack([first.w1.weight, second.w1.weight]), both)


class Bank(nn.Module):
    """Layers with lists of experts of which all are used, or that are no modules to call."""

    def __init__(self, *, top_k: int, callable: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ListedMoe(32, 4, top_k, calls_all=False) for _ in range(2)])
        if not callable:
            for layer in self.layers:
                layer.experts = nn.ModuleList(
                    nn.ModuleDict({"w": nn.Linear(32, 32)}) for _ in range(4)
                )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if isinstance(layer.experts[0], nn.ModuleDict):
                hidden = sum(expert["w"](hidden) for expert in layer.experts)
            else:
                hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize(("top_k", "callable"), [(4, True), (2, False)])
def test_other_lists_stream(top_k: int, callable: bool) -> None:
    torch.manual_seed(0)
    model = Bank(top_k=top_k, callable=callable).eval()
    hidden = torch.randn(1, 3, 32)
    with torch.no_grad():
        expected = model(hidden)
        with attach(model, budget={"HBM": "24KiB", "SSD": None}) as runtime:
            assert runtime.plan.cache_bytes == 0
            assert torch.equal(model(hidden), expected)
            assert not runtime._keeper.residency.layers
            assert runtime.stats().bytes_moved > 0


def test_experts_called_by_themselves_are_uses_of_their_own() -> None:
    model = tiny_listed_moe().eval()
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expert = model.model.layers[0].mlp.experts[3]
    with torch.no_grad():
        expected = expert(hidden)
        with attach(model, budget=budget_for(model, 0.3)) as runtime:
            assert torch.equal(expert(hidden), expected)
            assert torch.equal(expert(hidden), expected)
            stats = runtime.stats().experts
    assert stats is not None
    assert (stats.uses, stats.reads) == (2, 1)


def test_an_expert_that_is_called_twice_in_a_call_is_one_use() -> None:
    listed = ListedExperts.__new__(ListedExperts)  # its bookkeeping alone
    asked: list[tuple[int, bool, bool]] = []

    class Slots:
        def take(self, layer: int, number: int, tokens: Any, *, again: bool, goes_on: bool) -> None:
            asked.append((number, again, goes_on))

    listed._slots, listed._layer = Slots(), 0  # type: ignore[assignment]
    listed._tokens, listed._asked = None, set()
    listed.begin_call(1)
    for number in (2, 5, 2):
        listed.take(number, 1)
    listed.end_call()
    listed.take(2, 1)
    assert asked == [(2, False, False), (5, False, True), (2, True, True), (2, False, False)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_what_was_counted_outlasts_a_change_of_the_budget() -> None:
    model = tiny_listed_moe().eval()
    with attach(model, budget=budget_for(model, 0.5)) as runtime, torch.no_grad():
        for share in (0.5, 2.0, 0.5):  # the cache is made anew after the second
            runtime.budget = budget_for(model, share)
            model(IDS[:1, :1])
        stats = runtime.stats().experts
    assert stats is not None
    assert stats.uses == 8
    assert stats.ready <= stats.uses


def test_a_budget_that_another_thread_changes_while_it_runs() -> None:
    model = tiny_listed_moe().eval()
    model.generation_config.eos_token_id = None
    runs = iter(range(6))

    def text() -> torch.Tensor:
        answer: torch.Tensor = model.generate(
            IDS[:1, :4], max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        return answer

    expected = text()
    with attach(model, budget=budget_for(model, 0.8)) as runtime:
        wrong: list[Exception] = []

        def press() -> None:
            try:
                for share in (0.3, 0.8, 2.0, 0.5) * 5:
                    runtime.budget = budget_for(model, share)
            except Exception as error:
                wrong.append(error)

        thread = threading.Thread(target=press)
        thread.start()
        while thread.is_alive() or next(runs, None) is not None:
            assert torch.equal(text(), expected)
        thread.join()
        assert not wrong
        assert runtime._keeper.residency.resident_bytes() <= runtime.budget["HBM"]
