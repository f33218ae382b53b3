"""One suite for every system of the offload benchmark, those of ``$TIERHINTS_PLUGINS`` among them.

Systems for a GPU run on the CPU here, without streams: what that says of them is that their calls
are right.
"""

from pathlib import Path

import pytest
import torch

from lib.errors import InputError
from lib.units import MIB
from scripts.experiments.offload.checkpoint import make_checkpoint
from scripts.experiments.offload.peers import (
    SYSTEMS,
    Loaded,
    System,
    Task,
    register_system,
    systems_on,
)
from scripts.experiments.offload.settings import SETTINGS
from scripts.experiments.offload.shapes import GPT2Shape, LlamaShape
from scripts.experiments.offload.worker import generate

SHAPES = {
    "cpu": GPT2Shape(layers=2, width=16, heads=2, vocab_size=50, context=32),
    "cuda": LlamaShape(layers=3, width=32, inner=64, heads=2, vocab_size=64, context=64),
}
_NEEDS_A_GPU = {"flextensor"}


def load(system: System, device: str, folder: Path) -> Loaded:
    shape = SHAPES[device]
    task = Task(
        checkpoint=make_checkpoint(shape, folder),
        folder=folder / system.name,
        limit_bytes=None,
        reserve_bytes=0,
        budget_bytes=MIB
        if system.drafts or not system.full_precision
        else shape.num_bytes() * 2 // 3,
        machine=None,
    )
    task.folder.mkdir()
    if system.needs_preparing:
        system.prepare(task)
    return system.load(task)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("key", list(SYSTEMS))
def test_it_generates_what_the_resident_model_does(key: str, tmp_path: Path) -> None:
    system, device = SYSTEMS[key], key.rpartition(" on ")[2]
    if not system.is_installed():
        pytest.skip(f"not installed: {system.install}")
    if system.name in _NEEDS_A_GPU:
        pytest.skip("can't run without a GPU")
    with torch.no_grad():
        loaded = load(system, device, tmp_path)
        tokens = generate(loaded, [1, 2, 3], 6, None, "cpu")
        resident = load(systems_on(device)[0], device, tmp_path / "resident")
        expected = generate(resident, [1, 2, 3], 6, None, "cpu")
    assert len(tokens) == 6
    assert tokens == expected or not system.full_precision
    moved = loaded.bytes_per_pass
    assert moved is None or 0 <= moved <= SHAPES[device].num_bytes()


def test_each_device_has_its_systems_in_order() -> None:
    names = {device: [each.name for each in systems_on(device)] for device in SETTINGS}
    ours = ["resident", "ours-lossless", "ours-int8", "ours-int4"]
    assert names["cpu"][:8] == [*ours, "ours-exact", "transformers", "accelerate", "airllm"]
    flex = ["accelerate", "diffusers-block", "diffusers-leaf", "flextensor"]
    assert names["cuda"][:8] == [*ours, *flex]
    for device, systems in names.items():
        assert len(set(systems)) == len(systems), device
    assert not systems_on("cpu")[0].peer and systems_on("cpu")[5].peer


def test_a_system_for_both_devices_is_listed_on_both_and_once() -> None:
    with SYSTEMS.restored():

        @register_system
        class Both(System):
            name, label, devices = "both", "Both", ("cpu", "cuda")

            def load(self, task: Task) -> Loaded:
                raise AssertionError

        for setting in SETTINGS.values():
            assert [each.name for each in setting.systems].count("both") == 1
    with pytest.raises(InputError, match="'tpu'; allowed: cpu, cuda"):
        register_system(type("Tpu", (Both,), {"devices": ("tpu",)}))
