"""An operator's budget reaches the engine, and what is refused is said."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from lib.commands import monitor
from lib.errors import InputError
from lib.progressive.engine import Engine
from lib.serving.control import watched_budget
from lib.tiering.control.file import status_path, write_request


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_control_file_changes_the_budget(
    model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kv.json"

    def status() -> dict[str, Any]:
        return dict(json.loads(status_path(path).read_text()))

    with Engine(model, kv_budget=2**26) as engine, watched_budget(engine, path):
        assert status()["kv_budget"] == 2**26
        assert monitor.main([str(path), "--budget", "40MiB", "--once"]) == 0
        assert engine.stats().kv_budget == status()["kv_budget"] == 40 * 2**20
        assert "of 40.0 MiB" in capsys.readouterr().out
        for request, error in ((1000, "or more"), (None, "give a size"), ("some", "not a size")):
            answers = status()["answers"]
            write_request(path, request)
            wait_for(lambda before=answers: status()["answers"] > before)
            assert error in status()["error"] and status()["request"] == request
            assert engine.stats().kv_budget == 40 * 2**20
        with engine._lock:
            engine._runner.stats.cancelled = 3
        wait_for(lambda: status()["cancelled"] == 3)  # renewed without being asked


def test_without_one_nothing_is_watched(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with Engine(model, kv_budget=2**26) as engine:
        with watched_budget(engine, None):
            assert not list(tmp_path.iterdir())
        with (
            pytest.raises(InputError, match="isn't there"),
            watched_budget(engine, tmp_path / "no" / "kv.json"),
        ):
            pass
