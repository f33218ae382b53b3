import json
from pathlib import Path

import torch

from lib.policy.states import Transition
from lib.report.chrome_trace import make_trace, save_trace
from lib.tiering import attach
from lib.vocabulary import State
from tests.tiny_models import tiny_gpt2


def test_a_trace_has_what_streamed_and_what_moved(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with attach(model, budget={"HBM": "1MiB", "SSD": None}, spill_dir=tmp_path) as runtime:
        runtime.budget = {"HBM": "20KiB", "SSD": None}
        with torch.no_grad():
            model(torch.arange(1, 9)[None])
        runtime.budget = {"HBM": "1MiB", "SSD": None}
        count = save_trace(runtime, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) == count
    kinds = {(event.get("cat"), event["ph"]) for event in events}
    assert {("streamed", "X"), ("moved", "X"), (None, "M")} <= kinds
    assert all(event["dur"] > 0 and event["ts"] > 0 for event in events if event["ph"] == "X")
    assert all("S6" not in event["name"].split(" to ")[1] for event in events if "cat" in event)


def test_what_overlaps_is_in_lanes_of_its_own() -> None:
    def arrival(block: str, begin: float, end: float) -> Transition:
        return Transition(
            block=block,
            before=State.IN_FLIGHT,
            after=State.FULL,
            reason="streamed",
            begin=begin,
            end=end,
            num_bytes=1,
        )

    arrivals = [arrival("b", 2.0, 4.0), arrival("a", 1.0, 3.0), arrival("c", 3.0, 5.0)]
    events = make_trace([], arrivals)["traceEvents"]
    lanes = {event["name"][0]: event["tid"] for event in events if event["ph"] == "X"}
    assert lanes == {"a": 1, "b": 2, "c": 1}
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {1: "streamed", 2: "streamed"}
