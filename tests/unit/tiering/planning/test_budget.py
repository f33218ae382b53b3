"""Budgets: what is placed, what is used, and what happens when there is less than expected."""

import copy
import gc
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_gpt2, tiny_mixtral
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from lib.blocks import partition_model, storage_bytes
from lib.errors import InputError, PlacementError
from lib.hints import BlockHint, Hints
from lib.tiering import attach, empty_weights
from lib.tiering.residency.held import HeldGroup
from lib.tiering.stores import FileStore, NumaStore, numa
from lib.tiering.stores.numa import page_nodes
from lib.tiering.transfer.prefetch import Prefetcher
from lib.vocabulary import Precision, Tier

IDS = torch.arange(12).reshape(2, 6)


def medium() -> GPT2LMHeadModel:
    """A GPT-2 of 30 MiB, whose embedding is cut into three shards."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=3,
            n_embd=256,
            n_head=2,
            vocab_size=20000,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def all_bytes(model: nn.Module) -> int:
    return storage_bytes(model.parameters())


def smallest(model: nn.Module, precision: str | None = None) -> str:
    """Return the least HBM budget, as the refusal of a smaller one names it."""
    with pytest.raises(InputError) as refusal:
        attach(model, budget={"HBM": "1KiB", "SSD": None}, precision=precision)
    match = re.search(r"works is HBM=(\S+)", str(refusal.value))
    assert match is not None
    return match[1]


@pytest.mark.parametrize("share", [0.31, 0.5, 0.7, 0.95, 2.0])
def test_any_budget_gives_the_same_bits_within_it(share: float, tmp_path: Path) -> None:
    model = medium()
    expected = logits(model)
    budget = int(all_bytes(model) * share)
    with attach(model, budget={"HBM": budget, "SSD": None}, spill_dir=tmp_path) as runtime:
        for _ in range(3):
            assert torch.equal(logits(model), expected)
        stats = runtime.stats()
        assert stats.peak_resident_bytes <= runtime.plan.fast_bytes <= budget
        planned = runtime.plan.bytes_per_tier()
        assert (stats.bytes_moved > 0) == (Tier.SSD in planned)
        assert runtime.budget == {"HBM": budget, "SSD": None}
    assert torch.equal(logits(model), expected)


def test_fast_memory_stays_within_the_budget_for_20_random_plans(tmp_path: Path) -> None:
    generator = random.Random(0)
    model = medium()
    expected = logits(model)
    for _ in range(20):
        budget = int(all_bytes(model) * generator.uniform(0.4, 1.2))
        precision = generator.choice([None, "bf16", "int8", "int6", "int4", "int3"])
        with attach(
            model, budget={"HBM": budget, "SSD": None}, precision=precision, spill_dir=tmp_path
        ) as runtime:
            found = logits(model)
            stats = runtime.stats()
            assert (
                max(stats.peak_resident_bytes, runtime._keeper.residency.resident_bytes()) <= budget
            )
        assert precision is not None or torch.equal(found, expected)


def test_an_impossible_budget_is_refused_with_the_smallest_that_works(tmp_path: Path) -> None:
    model = medium()
    with pytest.raises(InputError, match="smallest") as refusal:
        attach(model, budget={"HBM": "100KiB", "SSD": None}, spill_dir=tmp_path)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert "slot to stream through" in str(refusal.value)
    with attach(model, budget={"HBM": smallest(model), "SSD": None}, spill_dir=tmp_path):
        logits(model)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"HBM": "lots", "SSD": None}, "lots"),
        ({"RAM": "1GiB"}, "unknown tier 'RAM'.*HBM"),
        ({"SSD": None}, "no HBM"),
    ],
)
def test_bad_budgets_are_named(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach(tiny_gpt2(), budget=budget)


def test_without_an_accelerator_ram_is_the_fast_tier(tmp_path: Path) -> None:
    model = medium()
    with attach(model, budget={"CPU": "10MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
        assert runtime.budget["HBM"] == 10 * 2**20
    with pytest.warns(UserWarning, match="CPU budget has no effect"):
        attach(
            model, budget={"HBM": "10MiB", "CPU": "1GiB", "SSD": None}, spill_dir=tmp_path
        ).detach()


def test_nothing_to_place_by_is_refused() -> None:
    with pytest.raises(InputError, match="neither hints nor a budget"):
        attach(tiny_gpt2())


class TestPrecision:
    @pytest.mark.parametrize(
        ("precision", "tolerance"),
        [
            ("bf16", 0.02),
            ("fp16", 0.01),
            ("int8", 0.02),
            ("int6", 0.08),
            ("int5", 0.16),
            ("int4", 0.35),
        ],
    )
    @pytest.mark.parametrize("streamed", [False, True])
    def test_outputs_are_near_and_detach_gives_the_original_back(
        self, precision: str, tolerance: float, streamed: bool, tmp_path: Path
    ) -> None:
        model = medium()
        expected = logits(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        budget = smallest(model, precision) if streamed else "64MiB"
        with attach(
            model,
            budget={"HBM": budget, "SSD": None},
            precision=precision,
            spill_dir=tmp_path,
        ) as runtime:
            found = logits(model)
            assert torch.equal(logits(model), found)
            assert runtime.stats().peak_resident_bytes <= runtime.plan.fast_bytes
            states = {str(placement.state) for placement in runtime.plan.placements.values()}
            assert ("S5" in states) == streamed
            assert streamed or ("S3" in states) == (precision in ("int6", "int5"))
        assert (found - expected).std() < tolerance * expected.std()
        assert not torch.equal(found, expected)
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_resident_and_streamed_give_nearly_the_same(self, tmp_path: Path) -> None:
        model, found = medium(), []
        for budget in ("64MiB", smallest(model, "int4")):
            with attach(
                model, budget={"HBM": budget, "SSD": None}, precision="int4", spill_dir=tmp_path
            ):
                found.append(logits(model))
        assert (found[0] - found[1]).std() < 0.02 * found[0].std()

    def test_a_floor_is_never_crossed(self, tmp_path: Path) -> None:
        model = medium()
        names = [f"transformer.h.{i}.mlp" for i in range(3)]
        budget = {"HBM": "1GiB", "SSD": None}
        runtime = attach(model, budget=budget, precision="int4", spill_dir=tmp_path)
        free = {name: runtime.plan.placements[name].precision for name in names}
        runtime.detach()
        hints = Hints(
            blocks={
                block: BlockHint(tier=Tier.HBM, floor=Precision.INT8 if block == names[1] else None)
                for block in (each.name for each in partition_model(model))
            }
        )
        with attach(model, hints, budget=budget, precision="int4", spill_dir=tmp_path) as runtime:
            held = {name: runtime.plan.placements[name].precision for name in names}
        assert set(free.values()) == {Precision.INT4}
        assert held == {**free, names[1]: Precision.INT8}

    def test_precision_by_block_and_unknown_blocks(self, tmp_path: Path) -> None:
        model = medium()
        with attach(
            model,
            budget={"HBM": "1GiB", "SSD": None},
            precision={"transformer.h.0.mlp": "int8"},
            spill_dir=tmp_path,
        ) as runtime:
            precisions = {n: p.precision for n, p in runtime.plan.placements.items()}
        assert precisions.pop("transformer.h.0.mlp") is Precision.INT8
        assert set(precisions.values()) == {Precision.FP32}
        with pytest.raises(InputError, match="no such block"):
            attach(model, budget={"HBM": "1GiB"}, precision={"transformer.h.9.mlp": "int8"})

    def test_packed_experts_can_be_compressed(self, tmp_path: Path) -> None:
        model = tiny_mixtral().eval()
        expected = logits(model)
        before = model.config._experts_implementation
        for budget in ("1GiB", smallest(model, "int8")):
            with attach(
                model, budget={"HBM": budget, "SSD": None}, precision="int8", spill_dir=tmp_path
            ) as runtime:
                assert (logits(model) - expected).std() < 0.05 * expected.std()
                # One expert is expanded at a time, never all of a layer.
                fast, peak = runtime.plan.fast_bytes, runtime.stats().peak_resident_bytes
                assert peak <= fast
        assert torch.equal(logits(model), expected)
        assert model.config._experts_implementation == before


class TestCheckpoint:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> tuple[Path, Tensor]:
        model = medium()
        model.save_pretrained(tmp_path / "checkpoint", max_shard_size="3MB")
        return tmp_path / "checkpoint", logits(model)

    @pytest.mark.parametrize(
        ("budget", "precision"), [("9MiB", None), ("1GiB", None), ("19MiB", "int8")]
    )
    def test_a_model_that_was_never_in_memory_runs(
        self, saved: tuple[Path, Tensor], budget: str, precision: str | None, tmp_path: Path
    ) -> None:
        folder, expected = saved
        with empty_weights():
            model = GPT2LMHeadModel(GPT2Config.from_pretrained(folder))
        model.eval()
        given = list(model.parameters())
        with attach(
            model,
            budget={"HBM": budget, "SSD": None},
            precision=precision,
            weights=folder,
            spill_dir=tmp_path / "spill",
        ):
            found = logits(model)
            assert torch.equal(found, expected) == (precision is None)
        assert [id(p) for p in model.parameters()] == [id(p) for p in given]
        assert all(p.device.type == "meta" for p in model.parameters())
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_a_checkpoint_of_another_shape_is_refused(self, saved: tuple[Path, Tensor]) -> None:
        folder, _ = saved
        with empty_weights():
            model = GPT2LMHeadModel(
                GPT2Config.from_pretrained(folder, n_positions=16, bos_token_id=0)
            )
        with pytest.raises(InputError, match=r"wpe.*\(16, 256\).*\(32, 256\)"):
            attach(model, budget={"HBM": "1GiB"}, weights=folder)

    def test_weights_for_a_model_that_has_its_own_are_refused(
        self, saved: tuple[Path, Tensor]
    ) -> None:
        with pytest.raises(InputError, match="meta device"):
            attach(medium(), budget={"HBM": "1GiB"}, weights=saved[0])

    def test_a_second_run_writes_nothing(self, saved: tuple[Path, Tensor], tmp_path: Path) -> None:
        folder, expected = saved
        written = []
        for _ in range(2):
            with empty_weights():
                model = GPT2LMHeadModel(GPT2Config.from_pretrained(folder))
            model.eval()
            spill = tmp_path / "spill"
            with attach(
                model, budget={"HBM": "9MiB", "SSD": None}, weights=folder, spill_dir=spill
            ):
                assert torch.equal(logits(model), expected)
            written.append({path: path.stat().st_mtime_ns for path in spill.iterdir()})
        assert written[0] == written[1] != {}


class TestLiveBudget:
    def test_a_new_budget_moves_weights_and_keeps_the_bits(self, tmp_path: Path) -> None:
        model = medium()
        expected = logits(model)
        with attach(model, budget={"HBM": "1GiB", "SSD": None}, spill_dir=tmp_path) as runtime:
            for size in ("10MiB", "14MiB", "9MiB", "1GiB"):
                runtime.budget = {"HBM": size, "SSD": None}
                assert torch.equal(logits(model), expected)
                stats = runtime.stats()
                assert stats.resident_bytes == runtime._keeper.residency.resident_bytes()
                assert stats.resident_bytes <= runtime.plan.fast_bytes
                assert stats.bytes_per_tier == {
                    str(tier): size
                    for tier, size in runtime._keeper.residency.bytes_per_tier().items()
                }
        assert torch.equal(logits(model), expected)

    def test_a_limit_for_a_while(self, tmp_path: Path) -> None:
        model = medium()
        expected, least = logits(model), smallest(model, "int8")
        with attach(
            model, budget={"HBM": "64MiB", "SSD": None}, precision="int8", spill_dir=tmp_path
        ) as runtime:
            found = logits(model)
            before = runtime.plan
            with runtime.limited({"HBM": least, "SSD": None}):
                assert runtime.plan.fast_bytes < before.fast_bytes
                assert (logits(model) - found).std() < 0.02 * found.std()
            assert runtime.plan == before
            assert torch.equal(logits(model), found)
        assert torch.equal(logits(model), expected)

    def test_an_impossible_one_changes_nothing(self, tmp_path: Path) -> None:
        model = medium()
        expected = logits(model)
        with attach(model, budget={"HBM": "10MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
            plan = runtime.plan
            with pytest.raises(InputError, match="smallest"):
                runtime.budget = {"HBM": "10KiB", "SSD": None}
            assert runtime.plan is plan
            assert torch.equal(logits(model), expected)

    def test_not_during_a_forward_and_not_after_detach(self, tmp_path: Path) -> None:
        model = medium()
        runtime = attach(model, budget={"HBM": "10MiB", "SSD": None}, spill_dir=tmp_path)

        def change(module: nn.Module, args: Any) -> None:
            runtime.budget = {"HBM": "9MiB", "SSD": None}

        handle = model.transformer.h[0].mlp.act.register_forward_pre_hook(change)
        with pytest.raises(PlacementError, match="during a forward"):
            logits(model)
        handle.remove()
        runtime.detach()
        with pytest.raises(PlacementError, match="after detach"):
            runtime.budget = {"HBM": "9MiB", "SSD": None}

    def test_out_of_memory_makes_it_take_less_and_go_on(self, tmp_path: Path) -> None:
        model = medium()
        expected = logits(model)
        with attach(model, budget={"HBM": "12MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
            before = runtime.plan.fast_bytes

            def exhaust(module: nn.Module, args: Any) -> None:
                raise torch.OutOfMemoryError("simulated")

            handle = model.transformer.h[1].mlp.act.register_forward_pre_hook(exhaust)
            with (
                pytest.warns(RuntimeWarning, match="takes .* of fast memory and goes on"),
                pytest.raises(torch.OutOfMemoryError),
            ):
                logits(model)
            handle.remove()
            assert runtime.plan.fast_bytes < before
            assert torch.equal(logits(model), expected)


class TestFailures:
    def test_a_read_error_is_named_and_the_next_forward_recovers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = medium()
        expected = logits(model)
        with attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path):
            read = FileStore.read_into

            def fail(self: FileStore, key: str, start: int, out: Tensor) -> None:
                raise PlacementError(f"payload {key}: Input/output error")

            monkeypatch.setattr(FileStore, "read_into", fail)
            with pytest.raises(PlacementError, match="Input/output error"):
                for _ in range(2):  # what was prefetched may still be sound
                    logits(model)
            monkeypatch.setattr(FileStore, "read_into", read)
            assert torch.equal(logits(model), expected)

    def test_a_removed_file_is_an_error_or_still_right(self, tmp_path: Path) -> None:
        model = medium()
        expected = logits(model)
        runtime = attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path)
        for path in tmp_path.glob("*.block"):
            path.unlink()
        try:
            assert torch.equal(logits(model), expected)
            runtime.detach()
        except PlacementError as error:
            assert "payload" in str(error)

    def test_out_of_memory_during_attach_restores_the_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:

        model = medium()
        expected = logits(model)

        def fail(num_bytes: int) -> Tensor:
            raise torch.OutOfMemoryError("simulated")

        from lib.tiering.transfer import readers

        with monkeypatch.context() as patch:
            patch.setattr(readers, "aligned_buffer", fail)
            with pytest.raises(torch.OutOfMemoryError):
                attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path)
        assert torch.equal(logits(model), expected)
        assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
        attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path).detach()

    def test_a_forked_child_gets_an_error_and_no_hang(self, tmp_path: Path) -> None:
        import os

        model = medium()
        expected = logits(model)
        with attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path):
            logits(model)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    logits(model)
                except PlacementError as error:
                    code = 0 if "forked" in str(error) else 2
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert torch.equal(logits(model), expected)

    def test_two_models_share_a_spill_folder(self, tmp_path: Path) -> None:
        first, second = medium(), medium()
        with torch.no_grad():
            second.transformer.h[0].mlp.c_fc.weight.add_(0.01)
        expected = [logits(first), logits(second)]
        budget = {"HBM": "9MiB", "SSD": None}
        with (
            attach(first, budget=budget, spill_dir=tmp_path),
            attach(second, budget=budget, spill_dir=tmp_path),
        ):
            assert torch.equal(logits(first), expected[0])
            assert torch.equal(logits(second), expected[1])
        assert not torch.equal(expected[0], expected[1])


def test_generate_batched_sampled_and_greedy_equals_the_resident_model(tmp_path: Path) -> None:
    model = medium()
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "pad_token_id": 0}
    for sampling in ({"do_sample": False}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(1)
        expected = model.generate(IDS, **arguments, **sampling)
        with attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path):
            torch.manual_seed(1)
            assert torch.equal(model.generate(IDS, **arguments, **sampling), expected)


def test_steady_state_allocates_no_slots(tmp_path: Path) -> None:
    model = medium()
    with attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
        slots = [slot.data_ptr() for slot in runtime._keeper.memory.transport.slots()]
        for _ in range(3):
            logits(model)
        gc.collect()
        assert [slot.data_ptr() for slot in runtime._keeper.memory.transport.slots()] == slots


class Functional(nn.Module):
    """Uses its embedding's weight as the head without a module for it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20000, 256)
        self.body = nn.Linear(256, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.body(self.embed(ids)), self.embed.weight)


def test_an_embedding_that_is_used_as_head_without_a_module_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Functional()
    with torch.no_grad():
        expected = model(IDS)
        for precision in (None, "int8"):
            budget = {"HBM": smallest(model, precision), "SSD": None}
            with attach(model, budget=budget, precision=precision, spill_dir=tmp_path):
                found = model(IDS)
            assert (found - expected).std() < 0.02 * expected.std()
            assert precision is not None or torch.equal(found, expected)


class Renamed(nn.Embedding):
    """Another class: its weights don't move by rows."""


def test_the_same_weights_in_another_layout_share_a_folder_and_don_t_mix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = torch.randn(50000, 100)
    ids = torch.tensor([0, 20971, 20972, 45000, 49999])
    for kind in (Renamed, nn.Embedding, Renamed):
        model = nn.Sequential(kind.from_pretrained(values.clone()))
        with attach(model, {"0": "SSD"}, mode="real", spill_dir=tmp_path), torch.no_grad():
            assert torch.equal(model(ids), values[ids])
        assert torch.equal(model[0].weight, values)


def test_strides_of_a_checkpoint_s_model_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3)).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    inputs = torch.randn(1, 8, 12, 12)
    with torch.no_grad():
        expected = model(inputs)
        with empty_weights():
            empty = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3)).eval()
        empty.to(memory_format=torch.channels_last)
        with attach(
            empty,
            budget={"HBM": "200KiB", "SSD": None},
            weights=tmp_path / "model.safetensors",
            spill_dir=tmp_path / "spill",
        ):
            assert torch.allclose(empty(inputs), expected, atol=1e-5)


def interrupted_after(stop: int, acquire: Callable[..., Any]) -> Callable[..., Any]:
    """Return an acquire whose call number ``stop`` does its work and is then interrupted."""
    calls: list[Any] = []

    def interrupt(*args: Any) -> Any:
        result = acquire(*args)
        calls.append(args)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return result

    return interrupt


class TestInterrupts:
    @pytest.mark.parametrize("owner", [HeldGroup, Prefetcher])
    def test_ctrl_c_after_an_acquire_leaves_the_model_right(
        self, owner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = medium()
        expected = logits(model)
        with attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
            for stop in (1, 3, 5):
                interrupt = interrupted_after(stop, owner.acquire)
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(owner, "acquire", interrupt)
                    for _ in range(3):
                        logits(model)
                for _ in range(2):
                    assert torch.equal(logits(model), expected)
            runtime.budget = {"HBM": "12MiB", "SSD": None}
            assert torch.equal(logits(model), expected)

    def test_ctrl_c_within_a_limit_for_a_while(self, tmp_path: Path) -> None:
        model = medium()
        expected = logits(model)

        def interrupt(module: nn.Module, args: Any) -> None:
            raise KeyboardInterrupt

        with attach(model, budget={"HBM": "64MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
            handle = model.transformer.h[1].mlp.act.register_forward_pre_hook(interrupt)
            with (
                pytest.raises(KeyboardInterrupt),
                runtime.limited({"HBM": "9MiB", "SSD": None}),
            ):
                logits(model)
            handle.remove()
            assert torch.equal(logits(model), expected)

    def test_submodules_called_by_themselves(self, tmp_path: Path) -> None:
        model = medium()
        with torch.no_grad():
            expected = model.transformer(IDS).last_hidden_state
            with attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
                for _ in range(5):
                    found = model.transformer(IDS).last_hidden_state
                    assert torch.equal(found, expected)
                assert len(runtime._forwards.trace) < 20


class TestFailedMoves:
    def test_a_re_plan_that_fails_goes_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = medium()
        expected = logits(model)
        with attach(model, budget={"HBM": "64MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
            put, calls = FileStore.put, []

            def fail(self: FileStore, key: str, num_bytes: int, parts: Any) -> None:
                calls.append(key)
                if len(calls) > 2:
                    raise PlacementError("the disk is full")
                put(self, key, num_bytes, parts)

            with monkeypatch.context() as patch:
                patch.setattr(FileStore, "put", fail)
                with pytest.raises(PlacementError, match="the disk is full"):
                    runtime.budget = {"HBM": "9MiB", "SSD": None}
            assert runtime.budget["HBM"] == 64 * 2**20
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)

    def test_moves_that_fail_both_ways_stop_the_model_until_another_budget(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = medium()
        expected = logits(model)
        with attach(model, budget={"HBM": "64MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
            moves = {name: getattr(HeldGroup, name) for name in ("send_off", "bring_in")}
            calls: list[str] = []

            def failing(name: str) -> Callable[..., None]:
                def move(self: HeldGroup, *args: Any, **options: Any) -> None:
                    calls.append(name)
                    if name == "bring_in" or len(calls) > 3:
                        raise PlacementError(f"no {name}")
                    moves[name](self, *args, **options)

                return move

            with monkeypatch.context() as patch:
                for name in moves:
                    patch.setattr(HeldGroup, name, failing(name))
                with pytest.raises(PlacementError, match="no send_off"):
                    runtime.budget = {"HBM": "9MiB", "SSD": None}
            assert set(calls) == set(moves)
            with pytest.raises(PlacementError, match="could not be moved .* nor back"):
                logits(model)
            for size in ("64MiB", "12MiB"):  # as before, and less
                runtime.budget = {"HBM": size, "SSD": None}
                assert torch.equal(logits(model), expected)
                held = {name: held.tier for name, held in runtime._keeper.residency.groups.items()}
                assert held == {name: p.tier for name, p in runtime.plan.placements.items()}
        assert torch.equal(logits(model), expected)

    def test_weights_that_were_changed_in_memory_are_not_forgotten(self, tmp_path: Path) -> None:
        model = medium()
        with attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
            runtime.budget = {"HBM": "64MiB", "SSD": None}
            with torch.no_grad():
                model.transformer.h[0].mlp.c_fc.weight.mul_(2)
            expected = logits(model)
            runtime.budget = {"HBM": "9MiB", "SSD": None}
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)

    def test_tiers_that_real_mode_lacks_are_refused(self) -> None:
        with pytest.raises(InputError, match="no PEER tier"):
            attach(medium(), budget={"HBM": "9MiB", "PEER": None})

    def test_copies_of_an_attached_model_are_refused(self, tmp_path: Path) -> None:
        model = medium()
        with attach(model, budget={"HBM": "9MiB", "SSD": None}, spill_dir=tmp_path):
            with pytest.raises(PlacementError, match="detach"):
                copy.deepcopy(model.transformer.h[0].mlp.c_fc.weight)
            with pytest.raises(PlacementError, match="detach"):
                model.load_state_dict(model.state_dict())


def test_an_empty_budget_is_refused(tmp_path: Path) -> None:
    model = medium()
    with pytest.raises(InputError, match="HBM"):
        attach(model, budget={}, spill_dir=tmp_path)
    with attach(model, budget={"HBM": None}, spill_dir=tmp_path) as runtime:
        for empty in ({}, None):
            with pytest.raises(InputError, match="HBM"):
                runtime.budget = empty  # type: ignore[assignment]
            with pytest.raises(InputError, match="HBM"), runtime.limited(empty):  # type: ignore[arg-type]
                pass
        assert runtime.budget == {"HBM": None}


def test_weights_leave_the_memory_of_a_numa_node_when_they_become_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 0 stands for one without CPUs; a store's memory must not become the weights."""
    if page_nodes(torch.ones(4096, dtype=torch.uint8)) != {0}:
        pytest.skip("this system does not say that memory is on node 0")
    allocate = NumaStore._allocate
    on_node: list[Tensor] = []

    def note(self: NumaStore, num_bytes: int) -> Tensor:
        on_node.append(allocate(self, num_bytes))
        return on_node[-1]

    monkeypatch.setattr(numa, "memory_nodes", lambda: [0, 1])
    monkeypatch.setattr(numa, "far_nodes", lambda: [0])
    monkeypatch.setattr(NumaStore, "_allocate", note)
    model = medium()
    expected, size = logits(model), all_bytes(model)
    budget = {"HBM": size // 2, "CXL": None}
    with attach(model, budget=budget, spill_dir=tmp_path) as runtime:
        assert runtime.plan.bytes_per_tier()[Tier.CXL] > 0
        assert torch.equal(logits(model), expected)
        runtime.budget = {"HBM": size * 2, "CXL": None}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        assert on_node and not weights & {buffer.data_ptr() for buffer in on_node}
        assert torch.equal(logits(model), expected)
        runtime.budget = budget
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
