import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2

from lib.tiering import attach
from lib.tiering.hooks import progress

IDS = torch.arange(1, 5).view(1, -1)


class Bar:
    """Records what a bar would show."""

    made: list["Bar"]

    def __init__(self, total: int, name: str, **options: Any) -> None:
        self.total, self.name, self.shown, self.closed = total, name, 0, False
        Bar.made.append(self)

    def update(self, num_bytes: int) -> None:
        assert not self.closed
        self.shown += num_bytes

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    Bar.made = []
    monkeypatch.setattr(progress, "progress_bar", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    return Bar.made


def test_a_generation_has_one_bar_for_all_its_passes(bars: list[Bar], tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    total = sum(parameter.nbytes for parameter in model.parameters())
    budget = {"HBM": total * 2 // 3, "SSD": None}
    with attach(model, budget=budget, spill_dir=tmp_path) as runtime:
        streamed = sum(sum(each.unit_bytes) for each in runtime.plan.placements.values())
        assert streamed
        placing = bars.pop()
        assert (placing.name, placing.closed) == ("placing weights", True)
        assert placing.shown >= placing.total > 0
        for _ in range(2):
            model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
            (bar,) = bars
            assert bar.closed  # generate() has returned
            assert bar.total == 3 * streamed
            assert 0 < bar.shown <= bar.total
            bars.clear()
        with torch.no_grad():
            model(IDS)
            model(IDS)
        assert [(bar.total, bar.closed) for bar in bars] == [(streamed, True)] * 2


def test_no_bar_runs_through_a_text_that_is_streamed(bars: list[Bar], tmp_path: Path) -> None:
    class Streamer:
        def put(self, ids: torch.Tensor) -> None:
            assert all(bar.closed for bar in bars)

        def end(self) -> None:
            pass

    model = tiny_gpt2().eval()
    total = sum(parameter.nbytes for parameter in model.parameters())
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    with attach(model, budget={"HBM": total * 2 // 3, "SSD": None}, spill_dir=tmp_path) as runtime:
        streamed = sum(sum(each.unit_bytes) for each in runtime.plan.placements.values())
        bars.clear()
        model.generate(IDS, streamer=Streamer(), **options)
        assert [bar.total for bar in bars] == [streamed]  # the prompt's pass
        bars.clear()
        model.generate(IDS, **options)  # and the next one has its bar again
        assert [bar.total for bar in bars] == [3 * streamed]


def test_nothing_is_shown_where_nobody_looks(tmp_path: Path) -> None:
    bar = progress.PassBar()
    bar.begin(10**9)
    bar.update(1)
    bar.end()
    assert bar._bar is None
