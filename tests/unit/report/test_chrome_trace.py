import json
from pathlib import Path

import torch

from lib.report.chrome_trace import save_trace
from lib.tiering import attach
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
