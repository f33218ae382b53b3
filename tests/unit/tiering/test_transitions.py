"""States at run time: each change is reported by what has carried it out."""

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_budgets import budget_for

from lib.policy.states import Transition
from lib.tiering import attach
from lib.vocabulary import State
from tests.tiny_models import tiny_gpt2, tiny_listed_moe, tiny_qwen_moe

IDS = torch.arange(1, 9)[None]
LARGE, SMALL = {"HBM": "1MiB", "SSD": None}, {"HBM": "20KiB", "SSD": None}


def of_each_block(transitions: list[Transition]) -> dict[str, list[Transition]]:
    found: dict[str, list[Transition]] = {}
    for change in transitions:
        found.setdefault(change.block, []).append(change)
    return found


def test_what_moves_for_good_is_reported_with_its_bytes_and_seconds(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        assert not runtime.transitions()  # it was placed, and nothing has moved since
        runtime.budget = SMALL
        gone = [name for name, place in runtime.plan.placements.items() if not place.resident_bytes]
        runtime.budget = LARGE
        found = of_each_block(runtime.transitions())
        assert set(found) == set(gone)
        for changes in found.values():
            states = [changes[0].before, *(change.after for change in changes)]
            assert states == [State.FULL, State.COLD, State.IN_FLIGHT, State.FULL]
            assert all(a.end <= b.begin for a, b in pairwise(changes))
            assert changes[-1].num_bytes > 0 < changes[-1].seconds
        runtime.budget = SMALL
        again = runtime.transitions()[-1]
        assert (again.after, again.num_bytes) == (State.COLD, 0)  # its bytes were there already


def test_another_precision_is_made_from_the_original(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with attach(model, budget=LARGE, precision="int8", spill_dir=tmp_path) as runtime:
        planning = runtime._keeper.planning
        name = "transformer.h.0.mlp"
        assert runtime.states()[name] is State.REDUCED
        planning.set_floors({"transformer.h.0.mlp": "fp32"})
        runtime.budget = LARGE
        found = of_each_block(runtime.transitions())[name]
        assert [change.after for change in found] == [State.COLD, State.IN_FLIGHT, State.FULL]
        assert runtime.states()[name] is State.FULL


def test_a_streamed_block_is_in_flight_before_it_is_there(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    seen: list[State] = []
    with attach(model, budget=SMALL, spill_dir=tmp_path) as runtime, torch.no_grad():
        model(IDS)
        name = next(name for name, place in runtime.plan.placements.items() if place.unit_bytes)
        module = model.get_submodule(name)

        def look(*_: object) -> None:
            thread = threading.Thread(target=lambda: seen.append(runtime.states()[name]))
            thread.start()
            thread.join()

        handle = module.register_forward_pre_hook(look)
        model(IDS)
        handle.remove()
        assert seen == [State.FULL]  # in a slot
        changes = of_each_block(runtime.transitions(streamed=True))[name]
        arrivals = [change for change in changes if change.before is State.IN_FLIGHT]
        assert arrivals and all(change.num_bytes and change.seconds > 0 for change in arrivals)
        assert {change.before for change in changes} == {
            State.COLD,
            State.IN_FLIGHT,
            State.FULL,
        }


def test_a_tied_copy_is_held_nowhere(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        states = runtime.states()
        assert states["lm_head.weight"] is State.RECOMPUTABLE
        assert states["transformer.wte"] is State.FULL


@pytest.mark.parametrize("make", [tiny_qwen_moe, tiny_listed_moe])
def test_experts_come_into_slots_and_leave_them(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    budget = budget_for(model, 0.3)
    options: Any = {"spill_dir": tmp_path, "look_ahead": False}
    with attach(model, budget=budget, **options) as runtime, torch.no_grad():
        for _ in range(3):
            model(IDS)
        slots = runtime._keeper.residency.experts
        expert_bytes = max(ticket.unit.num_bytes for ticket, _ in slots._slots.values())
        found = of_each_block(runtime.transitions(streamed=True))
        experts = {name: each for name, each in found.items() if ".experts." in name}
        assert experts
        for name, changes in experts.items():
            assert all(a.after is b.before for a, b in pairwise(changes))
            arrived = [each for each in changes if each.before is State.IN_FLIGHT]
            assert all(each.num_bytes == expert_bytes for each in arrived)
            assert all(each.end >= each.begin for each in changes)
            assert runtime.states()[name] is changes[-1].after
        assert State.FULL in {runtime.states()[name] for name in experts}
