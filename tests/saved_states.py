"""A trained model of a few thousand weights, and its optimizer's state in each format.

DeepSpeed isn't installed: its files are written as deepspeed.runtime.zero lays them out, with
classes of the same names.
"""

import dataclasses
import enum
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from lib.blocks import unique_parameters

BETA2 = 0.95
MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "mixtral": tiny_mixtral}
Writer = Callable[[Path, nn.Module, torch.optim.Optimizer], Path]


def train(name: str = "gpt2", steps: int = 3, *, groups: Any = None) -> tuple[Any, Any]:
    """Return a model and its optimizer after some steps; the groups are the Trainer's."""
    model = MODELS[name]()
    optimizer = torch.optim.AdamW((groups or trainer_groups)(model), lr=1e-3, betas=(0.9, BETA2))
    for step in range(steps):
        torch.manual_seed(step)
        ids = torch.randint(40, (4, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def trainer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """What get_decay_parameter_names of transformers 5 comes to for these models."""
    decays = {
        name: "bias" not in name and "norm" not in name and ".ln_" not in name
        for name in unique_parameters(model)
    }
    parameters = unique_parameters(model)
    return [
        {"params": [parameters[n] for n in decays if decays[n]], "weight_decay": 0.1},
        {"params": [parameters[n] for n in decays if not decays[n]], "weight_decay": 0.0},
    ]


def state_by_name(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    return {name: optimizer.state[each] for name, each in unique_parameters(model).items()}


def save_trainer(folder: Path, model: nn.Module, optimizer: Any) -> Path:
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def save_named(folder: Path, model: nn.Module, optimizer: Any) -> Path:
    """As torch does for an optimizer that was given named_parameters()."""
    names = {id(each): name for name, each in unique_parameters(model).items()}
    document = optimizer.state_dict()
    for saved, group in zip(document["param_groups"], optimizer.param_groups, strict=True):
        saved["param_names"] = [names[id(each)] for each in group["params"]]
    torch.save({"step": 3, "optimizer": document}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def save_full_fsdp(folder: Path, model: nn.Module, optimizer: Any) -> Path:
    torch.save(get_optimizer_state_dict(model, optimizer), folder / "optimizer.bin")
    return folder


def save_torchtitan(folder: Path, model: nn.Module, optimizer: Any) -> Path:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    _save_distributed({"model": model.state_dict(), "optimizer": state}, folder / "step-3")
    return folder / "step-3"


def save_olmo_core(folder: Path, model: nn.Module, optimizer: Any) -> Path:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    _save_distributed({"optim": state}, folder / "model_and_optim")
    return folder


def save_accelerate_fsdp2(folder: Path, model: nn.Module, optimizer: Any) -> Path:
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    _save_distributed(state, folder / "optimizer_0")
    return folder


def _save_distributed(state: dict[str, Any], folder: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saving in a single process
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def save_own(folder: Path, model: nn.Module, optimizer: Any) -> Path:
    tensors = {
        f"{name}/{key}": value.contiguous()
        for name, state in state_by_name(model, optimizer).items()
        for key, value in state.items()
    }
    save_file(tensors, folder / "optimizer.safetensors")
    scale = f'{{"beta2": {BETA2}, "steps": 3, "known": 0.0, "clip_sq": 0, "clip_sq_per_token": 0}}'
    (folder / "trainer_state.json").write_text(f'{{"step": 3, "scale": {scale}}}')
    return folder


@contextmanager
def deepspeed_classes() -> Iterator[Any]:
    """Have modules of DeepSpeed's names, with the classes that its checkpoints hold."""

    class ZeroStageEnum(int, enum.Enum):
        disabled = 0
        optimizer_states = 1
        gradients = 2
        weights = 3

    class LossScaler:
        def __init__(self, scale: float) -> None:
            self.cur_scale = scale

    @dataclasses.dataclass
    class fragment_address:  # noqa: N801
        numel: int
        start: int

    places = {
        "deepspeed.runtime.zero.config": ZeroStageEnum,
        "deepspeed.runtime.fp16.loss_scaler": LossScaler,
        "deepspeed.utils.tensor_fragment": fragment_address,
    }
    made = {}
    for place, cls in places.items():
        cls.__module__, cls.__qualname__ = place, cls.__name__
        for depth in range(1, place.count(".") + 2):
            name = ".".join(place.split(".")[:depth])
            made.setdefault(name, types.ModuleType(name))
        setattr(made[place], cls.__name__, cls)
    assert not made.keys() & sys.modules.keys()
    sys.modules.update(made)
    try:
        yield types.SimpleNamespace(
            stage=ZeroStageEnum, scaler=LossScaler, address=fragment_address
        )
    finally:
        for name in made:
            del sys.modules[name]


def save_zero(
    folder: Path,
    model: nn.Module,
    optimizer: Any,
    *,
    stage: int,
    world: int,
    mapped: bool = True,
    prefix: str = "",
    alignment: int = 0,
) -> Path:
    """Write ZeRO shards of a stage for a number of ranks. ``mapped``: with param_slice_mappings;
    ``alignment``: pad each parameter to a multiple of it.
    """
    place = folder / "global_step3"
    place.mkdir()
    (folder / "latest").write_text("global_step3")
    names = {id(each): name for name, each in unique_parameters(model).items()}
    groups = [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]
    states = state_by_name(model, optimizer)
    shapes = [
        OrderedDict((name, states[name]["exp_avg_sq"].shape) for name in group) for group in groups
    ]
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    with deepspeed_classes() as classes:
        ranks = [
            _zero3_rank(groups, states, settings, rank, world, classes)
            if stage == 3
            else _zero2_rank(
                groups, states, settings, rank, world, classes, stage, mapped, alignment
            )
            for rank in range(world)
        ]
        for rank, state in enumerate(ranks):
            document = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}
            file = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save(document, place / file)
        model_file = "zero_pp_rank_0_mp_rank_00" if stage == 3 else "mp_rank_00"
        document = {"module": model.state_dict(), "param_shapes": shapes, "ds_version": "0.19.8"}
        torch.save(document, place / f"{model_file}_model_states.pt")
    return folder


def _zero2_rank(
    groups: Sequence[Sequence[str]],
    states: dict[str, dict[str, Tensor]],
    settings: Sequence[dict[str, Any]],
    rank: int,
    world: int,
    classes: Any,
    stage: int,
    mapped: bool,
    alignment: int,
) -> dict[str, Any]:
    """A rank's stretch of each group's flat vector, padded to a multiple of 2 x world."""
    base: dict[str, Any] = {"state": {}, "param_groups": []}
    mappings, paddings, between = [], [], []
    for number, group in enumerate(groups):
        pieces, starts, offset = [], {}, 0
        gaps = []
        for name in group:
            flat = states[name]["exp_avg_sq"].flatten()
            gap = -flat.numel() % alignment if alignment else 0
            pieces += [flat, torch.zeros(gap)]
            starts[name] = offset
            gaps.append(gap)
            offset += flat.numel() + gap
        padding = -offset % (2 * world)
        whole = torch.cat([*pieces, torch.zeros(padding)])
        size = whole.numel() // world
        begin = rank * size
        mapping = OrderedDict()
        for name, start in starts.items():
            first = max(start, begin)
            last = min(start + states[name]["exp_avg_sq"].numel(), begin + size)
            if first < last:
                mapping[name] = classes.address(numel=last - first, start=first - begin)
        moment = whole[begin : begin + size].clone()
        step = states[group[0]]["step"]
        base["state"][number] = {
            "exp_avg": moment.clone(), "exp_avg_sq": moment, "step": step.clone()
        }  # fmt: skip
        base["param_groups"].append({**settings[number], "params": [number]})
        mappings.append(mapping)
        paddings.append(padding if rank == world - 1 else 0)
        between.append(gaps)
    state = {
        "loss_scaler": classes.scaler(1.0),
        "zero_stage": classes.stage(stage),
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": [],
        "group_paddings": paddings,
        "partition_count": [world] * len(groups),
    }
    if mapped:
        state["param_slice_mappings"] = mappings
    if alignment:
        state["param_alignment_paddings"] = between
    return state


def _zero3_rank(
    groups: Sequence[Sequence[str]],
    states: dict[str, dict[str, Tensor]],
    settings: Sequence[dict[str, Any]],
    rank: int,
    world: int,
    classes: Any,
) -> dict[str, Any]:
    """A rank's part of each parameter, ceil(elements / world) long, one behind the other."""
    base: dict[str, Any] = {"state": {}, "param_groups": []}
    for number, group in enumerate(groups):
        parts = []
        for name in group:
            flat = states[name]["exp_avg_sq"].flatten()
            size = math.ceil(flat.numel() / world)
            padded = torch.cat([flat, torch.full((size * world - flat.numel(),), 9.0)])
            parts.append(padded[rank * size : (rank + 1) * size])
        moment = torch.cat(parts)
        step = states[group[0]]["step"]
        base["state"][number] = {
            "exp_avg": moment.clone(), "exp_avg_sq": moment, "step": step.clone()
        }  # fmt: skip
        base["param_groups"].append({**settings[number], "params": [number]})
    return {
        "zero_stage": classes.stage(3),
        "loss_scaler": classes.scaler(1.0),
        "partition_count": world,
        "optimizer_state_dict": base,
        "fp32_flat_groups": [],
    }


def save_universal(folder: Path, model: nn.Module, optimizer: Any, *, stage3: bool = False) -> Path:
    """``stage3``: flat, and the steps in the common file alone, as DeepSpeed 0.19.8 leaves them."""
    for name, state in state_by_name(model, optimizer).items():
        place = folder / "zero" / name
        place.mkdir(parents=True)
        moment = state["exp_avg_sq"].flatten() if stage3 else state["exp_avg_sq"]
        torch.save({"param": moment}, place / "exp_avg_sq.pt")
        if not stage3:
            torch.save(state["step"], place / "step.pt")
    with deepspeed_classes() as classes:
        settings = {
            "zero_stage": classes.stage(1), "param_groups": optimizer.state_dict()["param_groups"]
        }  # fmt: skip
        if stage3:
            states = [{"step": torch.tensor(3.0)}, {"step": torch.tensor(3.0)}]
            settings["optimizer_state_dict"] = {"state": dict(enumerate(states))}
        torch.save(settings, folder / "zero" / "optimizer_state.pt")
    return folder


def _zero(**options: Any) -> Writer:
    return lambda folder, model, optimizer: save_zero(folder, model, optimizer, **options)


WRITERS: dict[str, Writer] = {
    "Trainer": save_trainer,
    "named parameters": save_named,
    "accelerate FSDP": save_full_fsdp,
    "torchtitan": save_torchtitan,
    "OLMo-core": save_olmo_core,
    "accelerate FSDP2": save_accelerate_fsdp2,
    "ZeRO 1, one rank": _zero(stage=1, world=1),
    "ZeRO 2, three ranks": _zero(stage=2, world=3),
    "ZeRO 1 in bf16, two ranks": _zero(stage=1, world=2, prefix="bf16_"),
    "ZeRO 2 without mappings": _zero(stage=2, world=3, mapped=False),
    "ZeRO 2, parameters aligned": _zero(stage=2, world=2, mapped=False, alignment=8),
    "ZeRO 3, one rank": _zero(stage=3, world=1),
    "ZeRO 3, three ranks": _zero(stage=3, world=3),
    "DeepSpeed universal": save_universal,
    "DeepSpeed universal of stage 3": partial(save_universal, stage3=True),
    "own": save_own,
}
