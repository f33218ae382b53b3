"""Two processes: moments sharded by FSDP2, and clipping measured under DistributedDataParallel."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from signal_models import VOCABULARY, toy_lm, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpt2.distributed import stop_world
from lib.hints import hints_to_json
from lib.signals import adam_hints
from lib.signals.meter import UpdateMeter

CLIP = 0.2


def make_hints(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    hints = adam_hints(
        optimizer,
        model,
        model_id="toy",
        hbm_threshold=0.3,
        cpu_threshold=0.8,
        tokens_per_update=12,
        clip=0,
    )
    document = hints_to_json(hints)
    del document["provenance"]["created"]
    return document


def sharded_hints() -> dict[str, Any]:
    """Train a sharded model on the same text in both processes: the gradients' mean is the same."""
    model = toy_lm()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    return make_hints(model, optimizer)


class LossModel(nn.Module):
    """Takes labels and the number of items as a Hugging Face model does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy_lm().train()
        self.inner.dropout.p = 0.0

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
        logits = self.inner(input_ids).logits[:, :-1].flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / options["num_items_in_batch"]


def clipped_updates(rank: int, world: int, *, steps: int, accumulation: int) -> list[Any]:
    """Return measured and true (tokens, clip coefficient) of steps of a loop like the Trainer's."""
    model: nn.Module = LossModel()
    meter = UpdateMeter(model, world_size=world, global_items=True, clips=True)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    generator = torch.Generator().manual_seed(0)
    measured = []
    for step in range(steps):
        length = 4 + step
        shape = (accumulation, world, 2, length)
        ids = torch.randint(0, VOCABULARY, shape, generator=generator)
        items = accumulation * world * 2 * (length - 1)
        model.zero_grad()
        for micro in range(accumulation):
            part = ids[micro, rank]
            loss = wrapped(input_ids=part, labels=part, num_items_in_batch=torch.tensor(items))
            scale = world * (0.01 if step == 0 else 1.0)  # the first step isn't clipped
            if world > 1 and micro < accumulation - 1:
                with wrapped.no_sync():
                    (loss * scale).backward()
            else:
                (loss * scale).backward()
            meter.micro_batches += 1
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        tokens, coefficient = meter.measure()
        measured.append((tokens, coefficient, items, min(1.0, CLIP / (norm + 1e-6))))
    meter.remove()
    return measured


def worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    updates = clipped_updates(rank, world, steps=3, accumulation=2)
    document = {"hints": sharded_hints(), "updates": updates}
    Path(folder, f"{rank}.json").write_text(json.dumps(document))
    stop_world()


def test_two_processes_give_the_hints_and_scale_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(2, port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second, "the ranks disagree"

    model = toy_lm()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    expected = make_hints(model, optimizer)
    found = first["hints"]
    # The digest may differ in a rounded bit: a sharded step sums in another order.
    assert found["model"]["class"] == expected["model"]["class"] == "ToyLM"
    assert found["blocks"].keys() == expected["blocks"].keys()
    for name, block in expected["blocks"].items():
        assert found["blocks"][name]["tier"] == block["tier"]
        assert found["blocks"][name]["signals"] == pytest.approx(block["signals"], rel=1e-4)

    check_updates(first["updates"])


def test_one_process_measures_clipping_and_tokens() -> None:
    updates = clipped_updates(0, 1, steps=3, accumulation=2)
    check_updates(updates)
    assert updates[0][1] == 1.0, "a step that isn't clipped is exactly 1"


def check_updates(updates: list[Any]) -> None:
    assert {coefficient < 1 for _, coefficient, _, _ in updates} == {True, False}
    for tokens, coefficient, items, expected in updates:
        assert tokens == pytest.approx(items, rel=1e-6)
        assert coefficient == pytest.approx(expected, rel=1e-5)


def test_what_was_not_seen_is_unknown() -> None:
    model = LossModel()
    meter = UpdateMeter(model, world_size=1, global_items=True, clips=True)
    ids = torch.zeros(1, 4, dtype=torch.long)
    options = {"labels": ids, "num_items_in_batch": 3}

    model(input_ids=ids, **options).backward()
    assert meter.measure()[0] is None, "a micro-batch that the loop did not count"
    model(input_ids=ids, **options).backward()
    meter.micro_batches = 2
    assert meter.measure()[0] is None, "a micro-batch that the hook did not see"
    model.zero_grad()
    meter.micro_batches = 1
    assert meter.measure() == (None, None), "no backward pass"
    model.eval()(input_ids=ids, **options).backward()
    meter.micro_batches = 1
    assert meter.measure()[0] is None, "evaluation isn't training"
    meter.remove()
    assert not model._forward_pre_hooks


def test_tokens_of_a_mean_over_micro_batches() -> None:
    """Unequal micro-batches under a mean of means: 1/B = sum_k n_k (1 / (A n_k))^2."""
    model = nn.Identity().train()
    meter = UpdateMeter(model, world_size=1, global_items=True, clips=False)
    for counted in (3, 9):
        labels = torch.zeros(1, 11, dtype=torch.long)
        labels[:, counted + 1 :] = -100
        model.forward = lambda *args, **kwargs: None  # type: ignore[method-assign]
        model(labels=labels)
    meter.micro_batches = 2
    assert meter.measure() == (pytest.approx(1 / (1 / 12 + 1 / 36)), 1.0)
