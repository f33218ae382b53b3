"""A pickle that runs code is refused wherever one is read, and nothing of it runs."""

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_states import WRITERS, deepspeed_classes, train

from lib.checkpoint.optimizer import open_optimizer
from lib.checkpoint.optimizer.deepspeed import PACKAGES
from lib.checkpoint.optimizer.pickles import Inert, load_records, load_torch
from lib.errors import InputError
from lib.signals import hints_from_checkpoint


class Attack:
    """Runs a shell command where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


PLACES = {
    "Trainer": "optimizer.pt",
    "named parameters": "ckpt.pt",
    "accelerate FSDP": "optimizer.bin",
    "ZeRO 2, three ranks": "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "ZeRO 1, one rank": "global_step3/mp_rank_00_model_states.pt",
    "ZeRO 3, one rank": "global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt",
    "DeepSpeed universal": "zero/transformer.wte.weight/exp_avg_sq.pt",
    "torchtitan": "step-3/.metadata",
    "OLMo-core": "model_and_optim/.metadata",
}


@pytest.mark.parametrize(("kind", "file"), PLACES.items())
def test_code_in_a_pickle_never_runs(kind: str, file: str, tmp_path: Path) -> None:
    model, optimizer = train()
    path = WRITERS[kind](tmp_path, model, optimizer)
    target = tmp_path / "ran"
    plain = file.endswith(".metadata")
    spoil(tmp_path / file, Attack(target), plain=plain)
    with pytest.raises(InputError, match=r"refused: its pickle names (posix|nt)\.system"):
        hints_from_checkpoint(path, model)
    assert not target.exists()


def spoil(file: Path, attack: Attack, *, plain: bool) -> None:
    """Put an attack into a file, beside all that it had."""
    if plain:
        document = pickle.loads(file.read_bytes())
        document.planner_data = attack
        file.write_bytes(pickle.dumps(document))
        return
    with deepspeed_classes():
        document = torch.load(file, weights_only=False)
        torch.save({**document, "more": attack}, file)


@pytest.mark.parametrize("name", ["torchtitan", "accelerate FSDP2"])
def test_code_in_a_part_of_a_distributed_checkpoint_never_runs(name: str, tmp_path: Path) -> None:
    model, optimizer = train()
    path = WRITERS[name](tmp_path, model, optimizer)
    folder = next(tmp_path.rglob(".metadata")).parent
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    target = tmp_path / "ran"
    for index, info in metadata.storage_data.items():
        if index.fqn.endswith((".betas", ".exp_avg_sq")):
            stream = io.BytesIO()
            torch.save(Attack(target), stream)
            info.relative_path, info.offset = "__9_9.distcp", 0
            info.length = len(stream.getvalue())
            (folder / "__9_9.distcp").write_bytes(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"refused: its pickle names (posix|nt)\.system"):
        hints_from_checkpoint(path, model)
    assert not target.exists()


def test_the_trainers_pickled_arguments_are_not_touched(tmp_path: Path) -> None:
    model, optimizer = train()
    target = tmp_path / "ran"
    torch.save(Attack(target), tmp_path / "training_args.bin")
    (tmp_path / "scheduler.pt").write_bytes(b"no pickle")
    WRITERS["Trainer"](tmp_path, model, optimizer)
    assert len(open_optimizer(tmp_path).moments(model)) == len(list(model.parameters()))
    assert not target.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "torch.hub.load", "numpy.load", "runpy.run_path"]
)
def test_a_record_may_name_only_what_is_listed(name: str, tmp_path: Path) -> None:
    module, _, function = name.rpartition(".")
    path = tmp_path / ".metadata"
    path.write_bytes(f"c{module}\n{function}\n(S'x'\ntR.".encode())
    with pytest.raises(InputError, match=f"names {name}"):
        load_records(path, [("pathlib", "PosixPath")])


def test_a_listed_name_is_a_class_that_does_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(tmp_path))
    found = load_records(path, [("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")])
    assert isinstance(found, Inert) and not isinstance(found, Path)


def test_a_protocol_of_extensions_and_persistent_ids_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(b"Psomething\n.")
    with pytest.raises(InputError, match="refers to something outside"):
        load_records(path, [])
    path.write_bytes(b"\x80\x02\x82\x01.")
    with pytest.raises(InputError, match="damaged"):
        load_records(path, [])


def test_classes_of_a_named_package_are_inert_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with deepspeed_classes() as classes:
        torch.save({"stage": classes.stage(2), "address": classes.address(4, 1)}, path)
    found = load_torch(path, where=path, inert=["deepspeed"])
    assert isinstance(found["stage"], Inert) and found["stage"].args == (2,)
    assert (found["address"].numel, found["address"].start) == (4, 1)
    with pytest.raises(InputError, match=r"names deepspeed\..*nothing of it was run"):
        load_torch(path, where=path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    contents: dict[str, Any] = {"empty": b"", "text": b"hello", "pickle": pickle.dumps({"a": 1})}
    for name, data in contents.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a whole file of torch.save"):
            load_torch(path, where=path)
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(InputError, match="damaged"):
        load_torch(path, where=path)


def test_nothing_is_imported_by_a_name_in_a_file(tmp_path: Path) -> None:
    """torch imports some of its modules where they are asked for."""
    path = tmp_path / ".metadata"
    before = set(sys.modules)
    for name in ("_inductor", "onnx", "_export"):
        path.write_bytes(f"ctorch\n{name}\n.".encode())
        with pytest.raises(InputError, match=f"names torch.{name}"):
            load_records(path, [])
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "name", ["numpy lib.os.system", "argparse _os.system", "pathlib os.system"]
)
def test_a_name_that_is_reached_through_an_inert_package_is_inert(
    name: str, tmp_path: Path
) -> None:
    module, _, function = name.partition(" ")
    ran, path = tmp_path / "ran", tmp_path / "state.pt"
    command = f"touch {ran}".encode()
    data = f"\x02c{module}\n{function}\n".encode()
    data = b"\x80" + data + b"X" + len(command).to_bytes(4, "little") + command + b"\x85R."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    assert isinstance(load_torch(path, where=path, inert=PACKAGES), Inert)
    assert not ran.exists()


def test_a_record_that_unpacks_to_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + b"\0" * (1 << 24))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(InputError, match="has compressed records"):
        load_torch(path, where=path)


def test_a_script_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(InputError, match="has compressed records"):
        load_torch(path, where=path)
