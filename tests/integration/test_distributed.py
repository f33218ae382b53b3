"""Two gloo processes under torchrun compute what one process does, and so are their hints."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import ROOT, read_tensors, tiny_config, write_config

from gpt2.train import train
from lib.hints import load_hints

SYMBOLS = {"TRAIN_ACCUMULATION": 2, "HINTS_ATTENTION_SEQUENCES": 2}

STOP_ONE_RANK = """
import os, signal, sys
from gpt2.train import main
from gpt2.trainer import Trainer

step = Trainer._step

def stepping(self, number, **options):
    if number == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, number, **options)

Trainer._step = stepping
sys.exit(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the single-process run that the others are compared with."""
    folder = tmp_path_factory.mktemp("distributed")
    train(*tiny_config(folder, RUN_NAME="one", **SYMBOLS))
    return folder


def torchrun(*arguments: str) -> dict[str, Any]:
    """Run a program on two processes and return the JSON of its last line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors
    return dict(json.loads(output.splitlines()[-1]))


def assert_same_run(run: Path, reference: Path) -> None:
    """Compare weights, optimizer state and hints of two runs, up to the order of summation."""
    tensors, expected = (read_tensors(path / "checkpoint") for path in (run, reference))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        # Adam divides by the root of tiny second moments, which magnifies rounding in the weights.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)
    hints, reference_hints = (load_hints(path / "tier_hints.json") for path in (run, reference))
    assert hints.provenance["world_size"] == 2
    for field in ("tokens_per_update", "mean_clip_sq", "step", "beta2", "accumulation"):
        assert hints.provenance[field] == pytest.approx(reference_hints.provenance[field], rel=1e-4)
    assert hints.blocks.keys() == reference_hints.blocks.keys()
    for name, hint in hints.blocks.items():
        other = reference_hints.blocks[name]
        assert (hint.tier, hint.rank, hint.num_bytes) == (other.tier, other.rank, other.num_bytes)
        assert hint.importance == pytest.approx(other.importance, rel=1e-3)
        assert hint.signals.keys() == other.signals.keys()
        for signal_name, value in hint.signals.items():
            assert value == pytest.approx(other.signals[signal_name], rel=1e-3), signal_name


def test_two_ddp_processes_equal_one(folder: Path) -> None:
    config = write_config(folder, RUN_NAME="ddp", **SYMBOLS)
    result = torchrun("-m", "gpt2.train", "--config", str(config))
    assert result["complete"]
    assert_same_run(folder / "runs/ddp", folder / "runs/one")


@pytest.mark.slow
def test_fsdp2_is_stopped_by_one_rank_and_continues_from_whole_tensors(folder: Path) -> None:
    config = write_config(folder, RUN_NAME="fsdp", TRAIN_FSDP2=True, **SYMBOLS)
    script = folder / "stop_one_rank.py"
    script.write_text(STOP_ONE_RANK)
    stopped = torchrun(str(script), "--config", str(config))
    assert (stopped["step"], stopped["complete"]) == (4, False)
    result = torchrun("-m", "gpt2.train", "--config", str(config))
    assert result["complete"]
    assert_same_run(folder / "runs/fsdp", folder / "runs/one")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp2", [False, True])
def test_experts_are_balanced_and_counted_over_all_processes(tmp_path: Path, fsdp2: bool) -> None:
    moe = SYMBOLS | {"MODEL_QWEN3_MOE": True, "MOE_EXPERTS": 4, "MOE_EXPERT_WIDTH": 8}
    train(*tiny_config(tmp_path, RUN_NAME="one", **moe))
    config = write_config(tmp_path, RUN_NAME="two", TRAIN_FSDP2=fsdp2, **moe)
    assert torchrun("-m", "gpt2.train", "--config", str(config))["complete"]
    assert_same_run(tmp_path / "runs/two", tmp_path / "runs/one")


@pytest.mark.slow
def test_sharded_weights_are_pruned_as_whole_ones(folder: Path) -> None:
    symbols = {"TRAIN_PRUNE": True, "TRAIN_PRUNE_GLOBAL": True, "TRAIN_PRUNE_EVERY": 1, **SYMBOLS}
    train(*tiny_config(folder, RUN_NAME="pruned", **symbols))
    config = write_config(folder, RUN_NAME="fsdp-pruned", TRAIN_FSDP2=True, **symbols)
    script = folder / "stop_one_rank.py"
    script.write_text(STOP_ONE_RANK)
    assert not torchrun(str(script), "--config", str(config))["complete"]
    assert torchrun("-m", "gpt2.train", "--config", str(config))["complete"]
    checkpoints = [folder / "runs" / name / "checkpoint" for name in ("fsdp-pruned", "pruned")]
    masks, expected = (load_file(path / "pruning.safetensors") for path in checkpoints)
    tensors = read_tensors(checkpoints[0])
    assert all(torch.equal(tensors[name] != 0, mask) for name, mask in masks.items())
    kept, same = (
        sum(int((f(masks[name], expected[name])).sum()) for name in masks)
        for f in (lambda a, b: a, lambda a, b: a == b)
    )
    size = sum(mask.numel() for mask in masks.values())
    assert size - kept == round(0.5 * size)
    assert same > 0.99 * size  # rounding moves a few scores across the threshold


def test_batch_that_the_processes_cannot_share_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2.distributed import World
    from gpt2.train import check_sizes
    from lib.errors import InputError

    config = tiny_config(folder, RUN_NAME="odd")[0].train
    with pytest.raises(InputError, match="TRAIN_BATCH_SIZE=4 is not a multiple of the 3 processes"):
        check_sizes(config, World(rank=0, size=3, device=torch.device("cpu")))
