"""Disks that fail or stall, and slots that are all taken, under a budget that changes: the run ends
right or with a clear error, and never hangs.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from lib.errors import InputError, PlacementError
from lib.policy.control import Settings
from lib.tiering import attach
from lib.tiering.stores.file import FileStore
from tests.tiny_models import tiny_gpt2

IDS = torch.arange(1, 9)[None]
LARGE = {"HBM": "1MiB", "SSD": None}
EAGER = Settings(dwell_us=1, refill_us=1, step_bytes=2**20)
DEADLINE_SECONDS = 60.0
_Result = TypeVar("_Result")


def watched(action: Callable[[], _Result]) -> _Result:
    """Do something in a thread of its own; fails where that hangs."""
    found: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
    return found[0]


def generate(model: Any) -> torch.Tensor:
    text: torch.Tensor = model.generate(IDS, max_new_tokens=6, do_sample=False)
    return text


class Disk:
    """The reads of all file stores, made to fail or to wait now and then."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fails_at: set[int] = set()
        self.stalls_at: set[int] = set()
        self.reads = 0
        read_into = FileStore.read_into

        def read(store: FileStore, key: str, start: int, out: torch.Tensor) -> None:
            self.reads += 1
            if self.reads in self.stalls_at:
                time.sleep(0.1)
            if self.reads in self.fails_at:
                raise OSError(5, "simulated read error")
            read_into(store, key, start, out)

        patch.setattr(FileStore, "read_into", read)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("after", [1, 5, 12, 31])
def test_a_read_error_is_raised_and_the_next_run_is_right(
    disk: Disk, tmp_path: Path, after: int
) -> None:
    model = tiny_gpt2().eval()
    want = generate(model)
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control = runtime.control(settings=EAGER)
        control.request(control.controller.floor_bytes)
        assert torch.equal(watched(lambda: generate(model)), want)
        disk.fails_at = {disk.reads + after}
        with pytest.raises(OSError, match="simulated read error"):
            for _ in range(20):
                assert torch.equal(watched(lambda: generate(model)), want)
        assert torch.equal(watched(lambda: generate(model)), want)
        watched(lambda: control.request(control.controller.floor_bytes))
        assert torch.equal(watched(lambda: generate(model)), want)


def test_a_promotion_that_cannot_be_read_leaves_the_run_right(disk: Disk, tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    want = generate(model)
    slow = Settings(dwell_us=10**9)
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control = runtime.control(settings=slow)
        control.request(control.controller.floor_bytes)
        small = runtime.plan
        disk.fails_at = {disk.reads + number for number in range(1, 4)}
        with pytest.raises((OSError, PlacementError), match="simulated read error"):
            runtime.budget = LARGE
        disk.fails_at = set()
        assert runtime.plan is small
        assert torch.equal(watched(lambda: generate(model)), want)
        runtime.budget = LARGE
        assert torch.equal(watched(lambda: generate(model)), want)


def test_a_disk_that_stalls_is_waited_for(disk: Disk, tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    want = generate(model)
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control = runtime.control(settings=EAGER)
        control.request(control.controller.floor_bytes)
        disk.stalls_at = {disk.reads + number for number in (2, 9, 17)}
        requests = threading.Thread(
            target=lambda: [control.request(size) for size in ("20KiB", None, "24KiB")]
        )
        requests.start()
        assert torch.equal(watched(lambda: generate(model)), want)
        requests.join(DEADLINE_SECONDS)
        assert not requests.is_alive()


def test_slots_of_which_views_are_kept_are_right_or_a_clear_error(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    want = generate(model)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control = runtime.control(settings=EAGER)

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            view = module.c_attn.weight.detach().view(-1)
            kept.append((view, view.clone()))

        handles = [layer.attn.register_forward_hook(keep) for layer in model.transformer.h]
        control.request(control.controller.floor_bytes)
        outcomes = []
        for size in ("24KiB", "20KiB", None, "20KiB"):
            try:
                control.request(size)
                outcomes.append(torch.equal(watched(lambda: generate(model)), want))
            except (InputError, PlacementError) as error:
                assert "budget" in str(error)  # noqa: PT017
        assert all(outcomes)
        assert all(torch.equal(view, copy) for view, copy in kept)
        for handle in handles:
            handle.remove()
        kept.clear()
        control.request(None)
        assert torch.equal(watched(lambda: generate(model)), want)
    assert torch.equal(generate(model), want)
