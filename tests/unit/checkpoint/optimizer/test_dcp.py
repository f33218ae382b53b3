"""torch.distributed.checkpoint folders: shards, and what is refused."""

import pickle
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from saved_states import save_accelerate_fsdp2, save_torchtitan, train, trainer_groups
from tiny_models import tiny_gpt2
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from lib.checkpoint.optimizer import open_optimizer
from lib.errors import InputError
from lib.signals.optimizers import corrected_moments


def worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    model = tiny_gpt2()
    for layer in model.transformer.h:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3)
    for step in range(2):
        torch.manual_seed(step + 10 * rank)
        ids = torch.randint(40, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=f"{folder}/dcp")
    live = dict(corrected_moments(optimizer, model))
    if rank == 0:
        torch.save(live, f"{folder}/live.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_shards_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(3, port, str(tmp_path)), nprocs=3)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 3
    expected = torch.load(tmp_path / "live.pt")
    found = open_optimizer(tmp_path / "dcp").moments(tiny_gpt2())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].corrected(), expected[name]) for name in expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, optimizer = train()
    return save_torchtitan(tmp_path, model, optimizer)


def change(folder: Path, name: str, **fields: Any) -> None:
    """Change where a part is said to be."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            for field, value in fields.items():
                setattr(info, field, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


MOMENT = "optimizer.state.transformer.wte.weight.exp_avg_sq"


@pytest.mark.parametrize(
    "fields",
    [{"relative_path": "../secret"}, {"relative_path": "/etc/passwd"}, {"offset": -1},
     {"offset": "0"}, {"length": 0}, {"relative_path": ".."}],
    ids=str,
)  # fmt: skip
def test_a_part_outside_of_the_folder_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    change(folder, MOMENT, **fields)
    moment = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"]
    with pytest.raises(InputError, match="is no place in a file of this folder: refused"):
        moment.read()


def test_missing_and_short_files_are_refused(folder: Path) -> None:
    change(folder, MOMENT, relative_path="__1_0.distcp")
    moment = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"]
    with pytest.raises(InputError, match="__1_0.distcp is missing or truncated"):
        moment.read()


def test_storage_extensions_are_refused(folder: Path) -> None:
    change(folder, MOMENT, transform_descriptors=["stream.zstd"])
    moment = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"]
    with pytest.raises(InputError, match="is stored compressed or encrypted"):
        moment.read()


def test_missing_and_overlapping_parts_are_refused(folder: Path) -> None:
    def cut(sizes: list[tuple[int, int]], offsets: list[tuple[int, int]]) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        entry = metadata.state_dict_metadata[MOMENT]
        chunk = type(entry.chunks[0])
        entry.chunks = [
            chunk(offsets=torch.Size(at), sizes=torch.Size(size))
            for at, size in zip(offsets, sizes, strict=True)
        ]
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    for sizes, offsets in (
        ([(20, 16)], [(0, 0)]),
        ([(20, 16), (20, 16)], [(0, 0), (20, 0)]),
        ([(40, 16), (40, 16)], [(0, 0), (0, 0)]),
        ([], []),
    ):
        cut(sizes, offsets)
        moment = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"]
        with pytest.raises(InputError, match="doesn't hold all of|isn't"):
            moment.read()


def test_chunks_of_several_files_are_put_together(folder: Path) -> None:
    whole = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"].read()
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    entry = metadata.state_dict_metadata[MOMENT]
    chunk, indices = type(entry.chunks[0]), metadata.storage_data
    index, info = next(item for item in indices.items() if item[0].fqn == MOMENT)
    del indices[index]
    entry.chunks = []
    for rank, (row, column) in enumerate([(0, 0), (0, 10), (15, 0), (15, 10)]):
        part = whole[row : 15 if row == 0 else 40, column : 10 if column == 0 else 16].clone()
        entry.chunks.append(chunk(offsets=torch.Size((row, column)), sizes=part.shape))
        with (folder / f"__{rank}_9.distcp").open("wb") as file:
            file.write(b"before")
            torch.save(part, file)
            length = file.tell() - 6
        place = type(info)(relative_path=f"__{rank}_9.distcp", offset=6, length=length)
        indices[type(index)(MOMENT, torch.Size((row, column)), rank)] = place
    path.write_bytes(pickle.dumps(metadata))
    found = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"]
    assert torch.equal(found.read(), whole)


def test_a_link_to_outside_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save(torch.ones(40, 16), tmp_path / "outside")
    (folder / "__l.distcp").symlink_to(tmp_path / "outside")
    length = (tmp_path / "outside").stat().st_size
    change(folder, MOMENT, relative_path="__l.distcp", offset=0, length=length)
    moment = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"]
    with pytest.raises(InputError, match="is a link to outside of the folder"):
        moment.read()


HALF = torch.ones(20, 16)


@pytest.mark.parametrize(
    ("offsets", "parts", "message"),
    [
        ([(0, 0), (10, 0)], [HALF, HALF], "overlap"),
        ([(-20, 0), (20, 0)], [HALF, HALF], "lies outside"),
        ([(0, 0), (30, 0)], [HALF, HALF], "lies outside"),
        ([(0,), (20, 0)], [torch.ones(320), HALF], "lies outside"),
        ([(0,), (20, 0)], [HALF, HALF], "lies outside"),
        ([(0, 0, 0), (20, 0)], [HALF[..., None], HALF], "lies outside"),
        ([(0, 0), (20, 0)], [HALF, HALF.to(torch.int8)], "isn't .* of torch.float32"),
        ([(0, 0), (20, 0)], [HALF, HALF.to("meta")], "damaged"),
    ],
    ids=["overlap", "before", "behind", "few", "short", "many", "int8", "meta"],
)
def test_parts_that_do_not_fit_are_refused(
    folder: Path, offsets: list[Any], parts: list[Any], message: str
) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    entry, stored = metadata.state_dict_metadata[MOMENT], metadata.storage_data
    index, info = next(item for item in stored.items() if item[0].fqn == MOMENT)
    chunk = type(entry.chunks[0])
    entry.chunks = [
        chunk(offsets=torch.Size(at), sizes=part.shape)
        for at, part in zip(offsets, parts, strict=True)
    ]
    for number, (at, part) in enumerate(zip(offsets, parts, strict=True)):
        name = f"__{number}_9.distcp"
        torch.save(part, folder / name)
        place = type(info)(relative_path=name, offset=0, length=(folder / name).stat().st_size)
        stored[type(index)(MOMENT, torch.Size(at), number)] = place
    path.write_bytes(pickle.dumps(metadata))
    moment = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"]
    with pytest.raises(InputError, match=message):
        moment.read()


def test_sizes_are_known_before_memory_is_taken(folder: Path) -> None:
    """A count of 2**42 elements, and a part of 2**40 bytes in a file with holes."""
    with (folder / "__s.distcp").open("wb") as file:
        file.truncate(1 << 40)
    whole = (folder / ".metadata").read_bytes()
    change(folder, MOMENT, relative_path="__s.distcp", length=1 << 40)
    moment = open_optimizer(folder).moments(tiny_gpt2())["transformer.wte.weight"]
    with pytest.raises(InputError, match=f"would take {1 << 40} bytes"):
        moment.read()
    metadata = pickle.loads(whole)
    metadata.state_dict_metadata[MOMENT.replace("exp_avg_sq", "step")].size = torch.Size((1 << 42,))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="isn't one number"):
        open_optimizer(folder).moments(tiny_gpt2())
    (folder / ".metadata").write_bytes(b"\x80\x02]r\xff\xff\xff\x0f.")
    with pytest.raises(InputError, match="damaged: it counts"):
        open_optimizer(folder)


def test_a_damaged_index_is_refused(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    for part in (b"", data[:100], data[: len(data) // 2], pickle.dumps([1, 2])):
        (folder / ".metadata").write_bytes(part)
        with pytest.raises(InputError, match=r"\.metadata is damaged or truncated"):
            open_optimizer(folder)


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saving in a single process
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_states_of_other_optimizers_are_refused(tmp_path: Path) -> None:
    one = torch.ones(2)
    for number, (key, message) in enumerate((
        ("exp_avg_sq_row", "Adafactor or CAME keeps only row"),
        ("momentum_buffer", "holds no second moment"),
        ("shampoo.factor_matrices.0", "SOAP or Shampoo keeps a preconditioner"),
    )):  # fmt: skip
        path = save({"optimizer": {f"state.a.weight.{key}": one}}, tmp_path / str(number))
        with pytest.raises(InputError, match=message):
            open_optimizer(path)
    path = save({"optimizer.state.exp_avg_sq.decoder.weight": one}, tmp_path / "megatron")
    with pytest.raises(InputError, match="is Megatron's"):
        open_optimizer(path)
    states = {f"{name}.state.a.weight.exp_avg_sq": one for name in ("optimizer", "muon")}
    with pytest.raises(InputError, match=r"several optimizers \(muon., optimizer.\)"):
        open_optimizer(save(states, tmp_path / "two"))


def test_groups_are_read_as_accelerate_stores_them(tmp_path: Path) -> None:
    model, optimizer = train()
    found = open_optimizer(save_accelerate_fsdp2(tmp_path, model, optimizer)).moments(model)
    assert {moment.beta2 for moment in found.values()} == {0.95}
    state = get_optimizer_state_dict(model, optimizer)
    whole = {f"state.{name}.{key}": value
             for name, kept in state["state"].items() for key, value in kept.items()}  # fmt: skip
    path = save({f"optimizer.{name}": value for name, value in whole.items()}, tmp_path / "bare")
    with pytest.raises(InputError, match="doesn't say beta2"):
        open_optimizer(path).moments(model)
    assert len(open_optimizer(path, beta2=0.95).moments(model)) == len(found)
