"""Experts one by one: the same bits as the whole model's, within any budget, whatever happens."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
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
from tiny_models import tiny_gpt_oss, tiny_olmoe, tiny_qwen_moe
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from lib.blocks import BlockKind, partition_model
from lib.checkpoint.ahead import ReadAhead
from lib.errors import InputError, PlacementError
from lib.precision.perturb import perturb, weight_error
from lib.tiering import attach, load
from lib.tiering.residency.experts import ExpertSlots
from lib.tiering.stores.file import FileStore
from lib.tiering.transfer.readers import ReaderTransport
from lib.vocabulary import Precision


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=8,
            vocab_size=40,
            initializer_range=0.3,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "qwen": tiny_qwen_moe,
    "olmoe": tiny_olmoe,
    "mixtral": mixtral,
    "gpt-oss": tiny_gpt_oss,
}


def num_guesses(slots: ExpertSlots) -> int:
    """What was read ahead, and whose layer has not come yet."""
    return sum(len(slots.foresight.guesses.of(layer)) for layer in range(len(slots._layers)))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_bits_are_those_of_the_whole_model_within_any_budget(
    model: Any, implementation: str
) -> None:
    model.set_experts_implementation(implementation)
    expected = outputs(model)
    given = {name: value.detach().clone() for name, value in model.named_parameters()}
    for share in (0.3, 0.6):
        budget = budget_for(model, share)
        with attach(model, budget=budget) as runtime:
            assert runtime.plan.cache_bytes
            assert same(outputs(model), expected)
            assert runtime.stats().peak_resident_bytes <= budget["HBM"]
            state = model.state_dict()
            assert all(torch.equal(state[name], value) for name, value in given.items())
        assert model.config._experts_implementation == implementation
        assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
        assert all(torch.equal(value, given[name]) for name, value in model.named_parameters())
    assert same(outputs(model), expected)


def test_compressed_experts_compute_the_same_from_below_as_in_fast_memory(model: Any) -> None:
    found = []
    for share in (2.0, 0.45):
        with attach(model, budget=budget_for(model, share), precision="int8") as runtime:
            found.append(outputs(model))
            assert bool(runtime.plan.cache_bytes) == (share < 1)
    assert same(*found)


@pytest.mark.parametrize("precision", ["int8", "int4", "bf16"])
def test_compressed_experts_compute_with_what_their_records_decode_to(
    model: Any, precision: str
) -> None:
    names = [block.name for block in partition_model(model) if block.kind is BlockKind.EXPERT]
    wanted = {name: Precision(precision) for name in names}
    packed = [name for name, each in model.named_parameters() if each.dim() == 3]
    errors = {name: weight_error(model, name, Precision(precision)) for name in packed}
    given = {name: model.get_parameter(name).detach().clone() for name in packed}
    with perturb(model, wanted):
        expected = outputs(model)[:2]
        decoded = {name: model.get_parameter(name).detach().clone() for name in packed}
    assert all(torch.equal(decoded[name] - given[name], errors[name]) for name in packed)
    for budget in ({"HBM": None, "SSD": None}, budget_for(model, 0.5)):
        with torch.no_grad(), attach(model, budget=budget, precision=dict(wanted)):
            for found, known in zip(outputs(model), expected, strict=False):
                assert torch.allclose(found, known, atol=2e-2 * float(known.abs().max()))
            for name in packed if budget["HBM"] is None else ():
                assert torch.equal(model.get_parameter(name) * 1, decoded[name])


def test_biases_of_compressed_experts_outlast_the_buffers_they_are_read_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_back = ReadAhead._give_back

    def overwrite(ahead: ReadAhead, piece: Any) -> None:
        if piece.data is not None:
            piece.data.fill_(255)
        give_back(ahead, piece)

    monkeypatch.setattr(ReadAhead, "_give_back", overwrite)
    monkeypatch.setenv("TIERHINTS_RECORDS", str(tmp_path / "records"))
    given = tiny_gpt_oss()
    biases = {name: each for name, each in given.named_parameters() if "experts" in name}
    biases = {name: each.data.normal_() for name, each in biases.items() if each.dim() == 2}
    given.save_pretrained(tmp_path)
    for _ in ("made", "kept"):
        model: Any = load(tmp_path)
        with attach(model, budget={"HBM": None, "SSD": None}, precision="int4", weights=tmp_path):
            for name, bias in biases.items():
                assert torch.equal(model.get_parameter(name) * 1, bias)
    assert any((tmp_path / "records").iterdir())


def test_each_expert_has_a_precision_and_a_floor_of_its_own() -> None:
    model = tiny_qwen_moe().eval()
    names = [block.name for block in partition_model(model) if block.kind is BlockKind.EXPERT]
    hints = make_hints(model, floor={names[1]: Precision.INT8})
    precision = {name: ("int4" if index % 2 else "int8") for index, name in enumerate(names[2:])}
    precision |= {names[1]: "int4"}
    for share in (2.0, 0.2):
        with attach(model, hints, budget=budget_for(model, share), precision=precision) as runtime:
            outputs(model)
            held = {name: str(runtime.plan.placements[name].precision) for name in names}
        assert held[names[0]] == "fp32"
        assert held[names[1]] == "int8"  # its floor
        assert [held[name] for name in names[2:4]] == ["int8", "int4"]


def test_a_budget_changes_while_attached() -> None:
    model = mixtral().eval()
    expected = outputs(model)
    with attach(model, budget=budget_for(model, 0.3)) as runtime:
        for share in (2.0, 0.3, 0.8, 0.3, 2.0):
            runtime.budget = budget_for(model, share)
            assert bool(runtime.plan.cache_bytes) == (share < 1)
            assert same(outputs(model), expected)
            measured = runtime._keeper.residency.resident_bytes()
            assert measured <= runtime.budget["HBM"]


def test_a_smaller_cache_keeps_what_it_has_room_for() -> None:
    model = tiny_qwen_moe().eval()
    with attach(model, budget=budget_for(model, 0.8)) as runtime:
        outputs(model)
        cache = slots_of(runtime).cache
        assert cache is not None
        before = cache.experts()
        runtime.budget = budget_for(model, 0.5)
        assert slots_of(runtime).cache is cache
        assert 0 < len(cache.experts()) < len(before)
        assert set(cache.experts()) <= set(before)


def test_a_checkpoint_is_read_expert_by_expert(tmp_path: Path) -> None:
    model = tiny_olmoe().eval()
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    empty: Any = load(tmp_path)
    with attach(empty, budget=budget_for(model, 0.4), weights=tmp_path) as runtime:
        assert same(outputs(empty), expected)
        runtime.budget = budget_for(model, 2.0)
        assert same(outputs(empty), expected)


def test_emulation_charges_what_is_routed_to() -> None:
    model = tiny_qwen_moe().eval()
    expected = outputs(model)
    with attach(model, budget=budget_for(model, 0.3), mode="emulated") as runtime:
        assert same(outputs(model), expected)
        stats = runtime.stats()
        assert stats.experts is not None
        reads = stats.experts.reads + stats.experts.predicted + stats.experts.prompt_reads
        moved = sum(stats.blocks[name].bytes_moved for name in stats.blocks if "experts" in name)
        unused = sum(weights is None for _, weights in slots_of(runtime)._slots.values())
    assert moved == expert_bytes(model) // 24 * (reads - unused)  # booked once used, or evicted


@pytest.mark.parametrize("fails", ["demand", "interrupt"])
def test_what_fails_in_a_use_leaves_a_model_that_computes(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_qwen_moe().eval()
    expected = outputs(model)
    with attach(model, budget=budget_for(model, 0.2)) as runtime:
        read, count = FileStore.read_into, iter(range(10_000))

        def broken(store: FileStore, key: str, start: int, out: Tensor) -> None:
            if next(count) % 5 == 4:
                raise PlacementError(f"payload {key} is damaged")
            read(store, key, start, out)

        if fails == "demand":
            monkeypatch.setattr(FileStore, "read_into", broken)
            with pytest.raises(PlacementError, match="damaged"):
                outputs(model)
        else:
            seen = iter(range(10_000))
            products = model.model.layers[1].mlp.experts._apply_gate

            def interrupted(x: Tensor) -> Tensor:
                if next(seen) == 3:
                    raise KeyboardInterrupt
                return products(x)  # type: ignore[no-any-return]

            with monkeypatch.context() as patch:
                patch.setitem(vars(model.model.layers[1].mlp.experts), "_apply_gate", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    outputs(model)
        monkeypatch.setattr(FileStore, "read_into", read)
        assert same(outputs(model), expected)
        assert runtime.stats().peak_resident_bytes <= runtime.budget["HBM"]
    assert same(outputs(model), expected)


def test_what_could_not_be_read_ahead_is_read_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_qwen_moe(num_hidden_layers=4).eval()
    texts = [IDS[:1, place : place + 2] for place in range(4)]
    with torch.no_grad(), attach(model, budget=budget_for(model, 0.3)) as runtime:
        slots = slots_of(runtime)
        slots.foresight.speculation.wants = lambda: True  # type: ignore[method-assign]
        expected = [model(text).logits for text in texts]
        read, submit = FileStore.read_into, ReaderTransport.submit
        ahead: set[str] = set()
        failed = []

        def note(self: Any, unit: Any, slot: int, *, urgent: bool = True) -> Any:
            (ahead.discard if urgent else ahead.add)(unit.key)
            return submit(self, unit, slot, urgent=urgent)

        def broken(self: FileStore, key: str, offset: int, target: torch.Tensor) -> None:
            if key in ahead:
                failed.append(key)
                raise OSError("not now")
            read(self, key, offset, target)

        with monkeypatch.context() as patch:
            patch.setattr(ReaderTransport, "submit", note)
            patch.setattr(FileStore, "read_into", broken)
            assert same([model(text).logits for text in texts], expected)
    assert failed


def test_the_cache_begins_with_what_training_has_routed_to() -> None:
    model = tiny_qwen_moe().eval()
    names = [block.name for block in partition_model(model) if block.kind is BlockKind.EXPERT]
    counts = {
        name: {"router_counts": 1000 if index % 8 == 5 else 1} for index, name in enumerate(names)
    }
    hints = make_hints(model, signals=counts)
    with attach(model, hints, budget=budget_for(model, 0.2)) as runtime:
        cache = slots_of(runtime).cache
        assert cache is not None
        assert {(layer, 5) for layer in range(3)} <= set(cache.experts())


def test_routers_foresee_what_comes() -> None:
    model = tiny_qwen_moe(num_hidden_layers=4).eval()
    expected = outputs(model)
    with attach(model, budget=budget_for(model, 0.3)) as runtime:
        slots_of(runtime).foresight.speculation.wants = lambda: True  # type: ignore[method-assign]
        outputs(model)  # shows which modules are routers
        runtime.reset_stats()
        assert same(outputs(model), expected)
        stats = runtime.stats().experts
    assert stats is not None
    assert stats.foreseen_uses > 0
    assert stats.predicted >= stats.useful + stats.wasted + num_guesses(slots_of(runtime))


@pytest.mark.parametrize("policy", ["lru", "lfu", "popularity"])
def test_other_policies_give_the_same_output(policy: str) -> None:
    model = tiny_qwen_moe().eval()
    expected = outputs(model)
    with attach(model, budget=budget_for(model, 0.3)) as runtime:
        slots = slots_of(runtime)
        slots.policy = policy
        slots.free()
        slots.adopt(runtime.plan)
        assert same(outputs(model), expected)


def test_experts_in_other_processes_are_refused() -> None:
    model = tiny_qwen_moe().eval()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(InputError, match="expert parallelism"):
        attach(model, budget={"HBM": "1GiB", "SSD": None})


def test_a_budget_too_small_names_the_smallest() -> None:
    model = tiny_qwen_moe().eval()
    with pytest.raises(InputError, match=r"smallest that works.*experts of a layer"):
        attach(model, budget={"HBM": 60_000, "SSD": None})
    with pytest.raises(InputError, match="don't hold the model's experts"):
        attach(model, budget={"HBM": "300KiB", "SSD": "100KiB"})


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interrupts:
    """Raises KeyboardInterrupt at the n-th line that is run of the modules that serve experts."""

    FILES = (
        "/experts.py",
        "lookahead.py",
        "foresight.py",
        "cache.py",
        "residents.py",
        "slot_pool.py",
        "readers.py",
    )

    def __init__(self, count: int) -> None:
        self._left = count

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename.endswith(self.FILES) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        self._left -= event == "line"
        if self._left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self._line


def test_interrupts_at_any_line_leave_cache_and_slots_whole() -> None:
    model = tiny_qwen_moe().eval()
    texts = [IDS[:1, place : place + 2] for place in range(4)]
    with torch.no_grad(), attach(model, budget=budget_for(model, 0.3)) as runtime:
        slots = slots_of(runtime)
        slots.foresight.speculation.wants = lambda: True  # type: ignore[method-assign]
        expected = [model(text).logits for text in texts]
        generator = random.Random(0)
        for _ in range(40):
            before = sys.gettrace()
            sys.settrace(Interrupts(generator.randrange(1, 4000)))
            try:
                for text in texts:
                    model(text)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
            assert same([model(text).logits for text in texts], expected)
            slots.mend()
            used = [ticket.slot for ticket, _ in slots._slots.values()]
            spare = [slot for each in slots.pool.spare.values() for slot in each]
            assert sorted(used + spare) == sorted(slots.transport._slots)  # type: ignore[attr-defined]
            assert sum(slot.nbytes for slot in slots.transport.slots()) <= runtime.plan.cache_bytes
