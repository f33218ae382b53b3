"""What is announced to the system before it is read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lib.checkpoint import ahead
from lib.checkpoint.ahead import ReadAhead
from lib.checkpoint.files import Extent, File
from lib.checkpoint.source import CheckpointSource


@dataclass
class Log:
    """A file that notes what is announced."""

    ranges: list[tuple[int, int]] = field(default_factory=list)

    def announce(self, start: int, num_bytes: int) -> None:
        self.ranges.append((start, start + num_bytes))

    def covered(self) -> list[tuple[int, int]]:
        """Join ranges that follow each other."""
        joined: list[tuple[int, int]] = []
        for start, end in self.ranges:
            if joined and joined[-1][1] == start:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((start, end))
        return joined


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 100)
    monkeypatch.setattr(ahead, "_STEP_BYTES", 30)
    yield


def extents(file: Any) -> list[tuple[str, list[Extent]]]:
    places = {"b": [(500, 80)], "a": [(0, 40), (200, 40)], "c": [(900, 300)]}
    return [(n, [Extent(file, *place) for place in found]) for n, found in places.items()]


@pytest.mark.usefixtures("small")
def test_what_comes_next_is_announced_once_and_in_order() -> None:
    file = Log()
    plan = ReadAhead(extents(file))
    plan.reached("b", 0)
    assert file.covered() == [(500, 580), (0, 30)]  # whole steps, at least as far as wanted
    plan.reached("b", 40)
    plan.reached("b", 40)
    assert file.covered() == [(500, 580), (0, 40), (200, 230)]
    plan.reached("c", 0)  # "a" was taken from elsewhere
    assert file.covered()[-1] == (900, 1020) and max(e - s for s, e in file.ranges) <= 30
    plan.reached("c", 290)
    assert file.covered()[-1][1] == 1200


@pytest.mark.usefixtures("small")
def test_a_tensor_that_was_not_expected_announces_nothing() -> None:
    file = Log()
    ReadAhead(extents(file)).reached("d", 0)
    assert file.ranges == []


def test_a_checkpoint_announces_what_it_was_told_to_expect(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: torch.rand(100, 10) for name in ("first", "second", "third")}
    save_file(tensors, tmp_path / "model.safetensors")
    log = Log()
    monkeypatch.setattr(File, "announce", lambda self, *place: log.announce(*place))
    source = CheckpointSource(tmp_path)
    source.read("first")
    assert log.ranges == []
    source.expect(["third", "first"])
    assert torch.equal(source.read("third", 0, 50), tensors["third"][:50])
    assert sum(end - start for start, end in log.ranges) == 8000  # both, and not the second
