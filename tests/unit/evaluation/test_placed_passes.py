"""Stays of blocks in slots, from the transitions of a run."""

from pathlib import Path

import torch

from lib.evaluation.placed_passes import describe_stays, find_stays
from lib.policy.states import Transition
from lib.tiering import attach
from lib.vocabulary import State
from tests.tiny_models import tiny_gpt2


def change(block: str, before: State, after: State, begin: float, end: float) -> Transition:
    return Transition(
        block=block, before=before, after=after, reason="", begin=begin, end=end, num_bytes=1
    )


def test_stays_begin_when_they_are_asked_for_and_end_when_the_slot_goes_to_another() -> None:
    changes = [
        change("early", State.IN_FLIGHT, State.FULL, 1.0, 1.5),
        change("early", State.FULL, State.COLD, 2.0, 2.0),
        change("b", State.COLD, State.IN_FLIGHT, 9.0, 9.0),
        change("b", State.IN_FLIGHT, State.FULL, 9.0, 11.0),
        change("a", State.IN_FLIGHT, State.FULL, 10.5, 11.0),
        change("b", State.FULL, State.COLD, 12.0, 12.0),
        change("a", State.IN_FLIGHT, State.FULL, 12.0, 12.5),  # two of its shards are there
        change("a", State.FULL, State.COLD, 13.0, 13.0),
    ]
    stays = find_stays(changes, since=10.0)
    assert stays == {"b": [(-1.0, 1.0, 2.0)], "a": [(0.5, 1.0, 3.0), (2.0, 2.5, None)]}
    assert list(stays) == ["b", "a"]


def test_a_real_run_has_them_and_emulation_none(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    budget = {"HBM": "20KiB", "SSD": None}
    with attach(model, budget=budget, spill_dir=tmp_path) as runtime, torch.no_grad():
        for _ in range(2):
            model(torch.arange(1, 9)[None])
        found = describe_stays(runtime, [60.0, 60.0])
        assert found is not None
        assert found["pass_seconds"] == [60.0, 60.0]
        moved = {name for name, place in runtime.plan.placements.items() if place.unit_bytes}
        assert set(found["stays"]) == moved
        for stays in found["stays"].values():
            for asked, there, left in stays:
                assert 0 <= asked <= there <= (there if left is None else left) <= 120
    with attach(model, budget=budget, mode="emulated") as runtime:
        assert describe_stays(runtime, [1.0]) is None
