"""The picture of a running model."""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from lib.progressive.waiting import EngineStats
from lib.report.monitor import draw_status, render_svg

STATUS: dict[str, Any] = {
    "request": "1MiB",
    "error": None,
    "limit_bytes": 2**20,
    "asked_bytes": None,
    "floor_bytes": 1000,
    "fast_bytes": 900_000,
    "bytes_per_tier": {"HBM": 600_000, "SSD": 2_000_000},
    "states": {"S1": 3, "S5": 7, "S6": 1, "S7": 1},
    "refusals": 2,
    "changes": 1,
    "last_change": {
        "asked_at": 1.0,
        "ended_at": 1.05,
        "demoted": ["a", "b"],
        "promoted": [],
        "reason": "the operator's limit",
    },
    "sample": None,
}
SAMPLE = {
    "seconds": 0.5,
    "forwards": 10,
    "bytes_moved": 2**20,
    "waited_seconds": 0.1,
    "hit_share": 0.75,
    "expert_uses": 8,
    "experts_resident": 4,
    "experts_ready": 6,
    "queue_depth": 1,
    "waited_for": [["h.0.mlp", 0.1]],
    "system": {"free_bytes": 2**30, "source": "machine", "waited_share": 0.02},
}


def drawn(status: dict[str, Any], age_seconds: float = 0.0) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(draw_status(status, age_seconds=age_seconds))
    return captured.get()


def test_what_is_taken_where_it_is_and_what_has_changed() -> None:
    text = drawn(STATUS)
    for part in ("878.9 KiB of 1.0 MiB (may grow to no limit", "7 blocks", "on storage", "2 left"):
        assert part in text, part
    assert "50 ms: the operator's limit" in text


def test_what_a_running_model_does() -> None:
    text = drawn({**STATUS, "sample": SAMPLE})
    for part in ("20.0 /s", "2.0 MiB/s", "20% of the time", "75.0%", "h.0.mlp", "pressure 2%"):
        assert part in text, part
    assert "50.0% resident, 75.0% ready" in text
    assert "experts" not in drawn({**STATUS, "sample": {**SAMPLE, "expert_uses": 0}})


def test_silence_and_refusals_are_said() -> None:
    text = drawn({**STATUS, "error": "too small"}, age_seconds=9)
    assert "last heard 9 s ago" in text and "refused: too small" in text


def test_what_a_server_does() -> None:
    figures = asdict(EngineStats(kv_budget=2**20, kv_bytes=2**19, running=3, evictions=7))
    text = drawn({"request": None, "error": "too small", "answers": 1, **figures})
    for part in ("512.0 KiB of 1.0 MiB", "3 running, 0 waiting", "evictions", "refused: too small"):
        assert part in text, part


def test_a_picture_of_it_fetches_nothing() -> None:
    picture = render_svg({**STATUS, "sample": SAMPLE}, age_seconds=0.0, title="budget.json")
    assert picture.startswith("<svg") and "budget.json" in picture
    assert "fast&#160;memory" in picture
    addresses = {each.partition('"')[0] for each in picture.split("http")[1:]}
    assert all("www.w3.org" in each or "textualize" in each for each in addresses)
    assert "@font-face" not in picture
