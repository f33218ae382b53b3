"""Progress without a terminal: a line every tenth, with the time to go."""

import pytest

from lib import progress
from lib.progress import progress_bar, show_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that it is, to be changed."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_long_work_prints_a_line_every_tenth(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    for item in show_progress(range(40), "counting", total=40):
        seen.append(item)
        clock[0] += 3
    lines = capsys.readouterr().err.splitlines()
    assert seen == list(range(40))
    assert len(lines) == 10
    assert lines[0] == "counting: 10%, 108 s to go" and lines[4] == "counting: 50%, 60 s to go"
    assert lines[-1] == "counting: 100%, in 120 s"


def test_short_work_prints_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(100, "counting") as bar:
        for _ in range(100):
            clock[0] += 0.04
            bar.update()
    assert not capsys.readouterr().err


def test_work_in_large_steps_prints_each_tenth_once(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(100, "reading", unit="B") as bar:
        for size in (45, 4, 1, 50):
            clock[0] += 10
            bar.update(size)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "reading: 45%",
        "reading: 50%",
        "reading: 100%",
    ]
