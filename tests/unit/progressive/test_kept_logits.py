"""Logits that wait to be compared are on disk, and few of them in memory."""

import errno
import os
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.errors import PlacementError
from lib.progressive.engine import Engine
from lib.progressive.generation import GenerationRequest
from lib.progressive.kept_logits import KeptLogits
from lib.progressive.kv.originals import OriginalsFolder


def num_open_files(folder: Path) -> int:
    links = (os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.exists())
    return sum(link.startswith(str(folder)) for link in links)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = KeptLogits(OriginalsFolder(tmp_path))
    rows = torch.randn(9, 101).to(dtype)
    for row in rows:
        kept.append(row)
    assert len(kept) == 9 and torch.equal(kept.read(2, 5), rows[2:7])
    os.pwrite(kept._file or 0, b"other", 3 * rows[0].nbytes)
    assert torch.equal(kept.read(4, 5), rows[4:])
    with pytest.raises(PlacementError, match="aren't what was written"):
        kept.read(2, 5)
    assert num_open_files(tmp_path) == 1
    del kept
    assert num_open_files(tmp_path) == 0 and not list(tmp_path.iterdir())


def test_a_full_disk_is_told_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "no room")

    kept = KeptLogits(OriginalsFolder(tmp_path))
    kept.append(torch.zeros(9))
    with monkeypatch.context() as context:
        context.setattr("os.pwrite", full)
        kept.append(torch.zeros(9))
    kept.append(torch.zeros(9))
    assert len(kept) == 3
    with pytest.raises(PlacementError, match="can't be kept .*no room"):
        kept.read(0, 1)


def test_of_a_measured_answer_few_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=400,
    )
    found: Queue[Any] = Queue()
    rows: list[int] = []
    real = KeptLogits.read

    def read(self: KeptLogits, start: int, count: int) -> torch.Tensor:
        rows.append(count)
        return real(self, start, count)

    monkeypatch.setattr(KeptLogits, "read", read)
    request = GenerationRequest(prompt=[1] * 150, max_new_tokens=200)
    with Engine(LlamaForCausalLM(config), kv_budget=2**24, folder=tmp_path) as engine:
        engine.measure(request, found.put, tier=0)
        measured = found.get(timeout=60)
        assert engine.drain(10)
    assert len(measured.divergences) == sum(rows) == 200
    assert max(rows) <= 64
    assert num_open_files(tmp_path) == 0
