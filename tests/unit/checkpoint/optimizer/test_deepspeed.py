"""DeepSpeed's shards: which files belong together, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_states import deepspeed_classes, save_zero, train
from tiny_models import tiny_gpt2

from lib.checkpoint.optimizer import open_optimizer
from lib.errors import InputError
from lib.signals.optimizers import corrected_moments

SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module", params=[2, 3])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    model, optimizer = train()
    save_zero(folder, model, optimizer, stage=request.param, world=3)
    torch.save(dict(corrected_moments(optimizer, model)), folder / "live.pt")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_may_be_named_in_several_ways(folder: Path) -> None:
    expected = torch.load(folder / "live.pt")
    step = folder / "global_step3"
    (folder / "live.pt").unlink()
    for path in (folder, step, step / SHARD.format(1)):
        found = open_optimizer(path).moments(tiny_gpt2())
        assert all(torch.equal(found[name].corrected(), expected[name]) for name in expected)
    (folder / "latest").unlink()
    assert open_optimizer(folder).path == step
    shutil.copytree(step, folder / "global_step4")
    with pytest.raises(InputError, match=r"several steps \(global_step3, global_step4, and no"):
        open_optimizer(folder)
    for name in ("../../elsewhere", "..", "global_step9"):
        (folder / "latest").write_text(name)
        with pytest.raises(InputError, match=f"'latest' names '{name}', and there is no such"):
            open_optimizer(folder)


def test_every_rank_is_needed(folder: Path) -> None:
    (folder / "global_step3" / SHARD.format(2)).unlink()
    with pytest.raises(InputError, match="2 optimizer files of a run on 3 ranks"):
        open_optimizer(folder)
    (folder / "global_step3" / SHARD.format(0)).unlink()
    with pytest.raises(InputError, match="no optimizer file of rank 0"):
        open_optimizer(folder)


def test_the_files_that_name_the_parameters_are_needed(folder: Path) -> None:
    (states,) = (folder / "global_step3").glob("*model_states.pt")
    torch.save({"module": {}}, states)
    with pytest.raises(InputError, match="doesn't name the parameters"):
        open_optimizer(folder)
    states.unlink()
    with pytest.raises(InputError, match="which names the parameters: copy the whole folder"):
        open_optimizer(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor-parallel run"),
     ("expp_rank_0_mp_rank_00_optim_states.pt", "split experts"),
     ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "two files of rank 0")],
)  # fmt: skip
def test_runs_that_split_otherwise_are_refused(folder: Path, name: str, message: str) -> None:
    shutil.copy(folder / "global_step3" / SHARD.format(0), folder / "global_step3" / name)
    with pytest.raises(InputError, match=message):
        open_optimizer(folder)


def edit(folder: Path, rank: int, change: Any) -> None:
    path = folder / "global_step3" / SHARD.format(rank)
    with deepspeed_classes():
        document = torch.load(path, weights_only=False)
        change(document["optimizer_state_dict"])
        torch.save(document, path)


def test_shards_of_another_run_are_refused(folder: Path) -> None:
    def shorten(state: dict[str, Any]) -> None:
        base = state.get("optimizer_state_dict") or state["base_optimizer_state"]
        base["state"][0]["exp_avg_sq"] = base["state"][0]["exp_avg_sq"][:-40].clone()

    edit(folder, 0, shorten)
    with pytest.raises(InputError, match="copy"):
        for moment in open_optimizer(folder).moments(tiny_gpt2()).values():
            moment.read()


def base_of(state: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = state.get("optimizer_state_dict") or state["base_optimizer_state"]
    return base


def test_ranks_of_several_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    def later(state: dict[str, Any]) -> None:
        base_of(state)["state"][0]["step"] = torch.tensor(99.0)

    def slower(state: dict[str, Any]) -> None:
        base_of(state)["param_groups"][1]["betas"] = (0.9, 0.99)

    for number, other in enumerate((later, slower)):
        copy = shutil.copytree(folder, tmp_path / str(number))
        edit(copy, 1, other)
        with pytest.raises(InputError, match="the ranks differ in groups, steps or settings"):
            open_optimizer(copy)
    step = folder / "global_step3"
    shutil.copy(step / SHARD.format(1), step / SHARD.format(0))
    with pytest.raises(InputError, match="files of ranks 0 and 1 hold the same numbers"):
        open_optimizer(folder)


def test_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    model, optimizer = train()
    save_zero(tmp_path, model, optimizer, stage=2, world=3)

    def begin_at_once(state: dict[str, Any]) -> None:
        for mapping in state["param_slice_mappings"]:
            for address in mapping.values():
                address.start = 0

    edit(tmp_path, 1, begin_at_once)
    with pytest.raises(InputError, match="parts of rank 1's group 0 overlap"):
        open_optimizer(tmp_path).moments(model)


@pytest.mark.parametrize("damage", ["moment", "state", "groups"])
def test_what_is_no_state_is_refused(folder: Path, damage: str) -> None:
    def spoil(state: dict[str, Any]) -> None:
        base = base_of(state)
        if damage == "moment":
            base["state"][0]["exp_avg_sq"] = 5
        elif damage == "state":
            base["state"][0] = 5
        else:
            base["param_groups"] = base["param_groups"][:1]

    for rank in range(3):
        edit(folder, rank, spoil)
    with pytest.raises(InputError, match="exp_avg_sq of 'group 0' is int|damaged|copy all"):
        open_optimizer(folder).moments(tiny_gpt2())


def test_an_optimizer_without_a_second_moment_is_refused(folder: Path) -> None:
    def replace(state: dict[str, Any]) -> None:
        base = state.get("optimizer_state_dict") or state["base_optimizer_state"]
        for entry in base["state"].values():
            entry["momentum_buffer"] = entry.pop("exp_avg_sq")

    for rank in range(3):
        edit(folder, rank, replace)
    with pytest.raises(InputError, match="as SGD and Muon do"):
        open_optimizer(folder)


def test_elastic_checkpoints_need_beta2(tmp_path: Path) -> None:
    """Their states are a list without padding, and their groups are not saved."""
    model, optimizer = train()
    save_zero(tmp_path, model, optimizer, stage=1, world=2)

    def lean(state: dict[str, Any]) -> None:
        entries = state["base_optimizer_state"]["state"]
        for number, padding in enumerate(state["group_paddings"]):
            flat = entries[number]["exp_avg_sq"]
            entries[number]["exp_avg_sq"] = flat[: len(flat) - padding].clone()
        state["base_optimizer_state"] = list(entries.values())

    for rank in range(2):
        edit(tmp_path, rank, lean)
    with pytest.raises(InputError, match="doesn't say beta2"):
        open_optimizer(tmp_path).moments(tiny_gpt2())
    found = open_optimizer(tmp_path, beta2=0.95).moments(tiny_gpt2())
    for name, values in corrected_moments(optimizer, model):
        assert torch.equal(found[name].corrected(), values)
