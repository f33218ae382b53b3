"""DeepSpeed's ZeRO shards: ``global_stepN/[bf16_]zero_pp_rank_<d>_mp_rank_00_optim_states.pt``.

Each rank keeps a part of long flat vectors. Which parameters these are made of, in which order, is
in the files of the model's states (``param_shapes``). In stages 1 and 2 a rank has a stretch of
each group's vector, cut anywhere; ``param_slice_mappings`` gives the place of each parameter's part
in it (deepspeed.checkpoint.ds_to_universal), and where that is missing the parts lie one behind the
other. In stage 3 each parameter is cut into one part per rank, ceil(elements / ranks) long
(deepspeed.utils.zero_to_fp32). DeepSpeed need not be installed: its classes are read as ``Inert``.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from .interface import OptimizerFile, SavedMoment, is_plain_name, register_format
from .names import match_names
from .pickles import load_torch
from .states import check_keys, check_moment, describe_kind, read_beta2, read_step

_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
PACKAGES = ("deepspeed", "megatron", "argparse", "numpy", "_codecs", "pathlib")
"""Whose classes stand beside the tensors: enums, loss scalers, arguments, random states. Any name
of theirs is let in as ``Inert``, which is neither imported nor called."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Part of a rank's flat vector number ``index``."""

    rank: int
    index: int
    start: int
    length: int


@register_format
class DeepSpeedShards(OptimizerFile):
    """A folder with one file per rank."""

    format = "DeepSpeed ZeRO"

    @classmethod
    def find(cls, path: Path) -> Path | None:
        """Return the folder of the shards: this one, the one that ``latest`` names, or the only
        ``global_step<n>`` in it.
        """
        if path.is_file():
            return path.parent if _SHARD.fullmatch(path.name) else None
        folders = [path]
        if (path / "latest").is_file():
            name = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()[:200]
            if not is_plain_name(name) or not (path / name).is_dir():
                raise InputError(
                    f"checkpoint {path}: its file 'latest' names {name!r}, and there is no such "
                    "folder in it: copy that, or give the folder of a step"
                )
            folders.append(path / name)
        else:
            steps = sorted(
                each for each in path.glob("global_step*") if any(each.glob("*zero_pp_rank*"))
            )
            if len(steps) > 1:
                raise InputError(
                    f"checkpoint {path} has several steps ({', '.join(s.name for s in steps[:4])}, "
                    "and no file 'latest'): give the folder of one"
                )
            folders += steps
        return next((each for each in folders if any(each.glob("*_optim_states.pt"))), None)

    def __init__(self, path: Path, *, beta2: float | None = None) -> None:
        self.path = path
        self._beta2 = beta2
        files = _shard_files(path)
        self._shapes = _read_shapes(path)
        self._ranks = [_read_shard(file) for file in files]
        for count in _partition_counts(self._ranks[0]):
            if count != len(files):
                raise InputError(
                    f"{path} has {len(files)} optimizer files of a run on {count} ranks: copy all "
                    "of them (or its experts are split otherwise, which is not read here)"
                )
        self._stage3 = "optimizer_state_dict" in self._ranks[0]
        parts = [_base_state(rank, path) for rank in self._ranks]
        self._states = [states for states, _ in parts]
        self._groups = parts[0][1]
        made = []
        for states, groups in parts:
            for number, state in enumerate(states):
                check_keys(state, f"group {number}", path)
                moment = check_moment(state["exp_avg_sq"], f"group {number}", path)
                if moment.dim() != 1 or not moment.is_contiguous():
                    raise InputError(f"{path}: the moment of group {number} isn't flat: damaged")
            kind = describe_kind(groups, [key for state in states for key in state])
            made.append((kind, [self._window(n, s, groups) for n, s in enumerate(states)]))
        if any(each != made[0] for each in made):
            raise InputError(
                f"{path}: the ranks differ in groups, steps or settings, so that their files are "
                "not of one checkpoint: copy all of them again"
            )
        if not self._stage3 and len(self._states[0]) != len(self._shapes):
            raise InputError(
                f"{path} has {len(self._states[0])} groups of moments and {len(self._shapes)} of "
                "parameters: the files are not of one checkpoint; copy all of them again"
            )
        self._refuse_copies()
        self.kind = made[0][0]

    def find_moments(self, model: nn.Module) -> dict[str, SavedMoment]:
        """Find each parameter's stretches, and match the names with the model's."""
        stretches = dict(self._stage3_stretches() if self._stage3 else self._flat_stretches())
        found = {name: self._moment(name, parts) for name, parts in stretches.items()}
        return match_names(model, found, path=self.path)

    def _moment(self, name: str, parts: Sequence[_Stretch]) -> SavedMoment:
        shape = next(shapes[name] for shapes in self._shapes if name in shapes)
        held = sum(part.length for part in parts)
        if held != shape.numel():
            raise InputError(
                f"{self.path} has {held} of the {shape.numel()} elements of {name!r}: the files "
                "are not of one checkpoint, or some are missing; copy all of them again"
            )

        def read() -> Tensor:
            flat = [self._flat(part).narrow(0, part.start, part.length) for part in parts]
            return torch.cat(flat).view(shape)

        index = parts[0].index if parts else 0
        step, beta2 = self._window(index, self._states[0][index], self._groups)
        return SavedMoment(shape=shape, steps=(step,), beta2=beta2, read=read)

    def _window(
        self, index: int, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> tuple[int, float]:
        """Return step and beta2 of a flat vector."""
        group = groups[index] if groups else {}
        step = read_step(state, group, f"group {index}", self.path)
        return step, read_beta2(group, self._beta2, self.path)

    def _refuse_copies(self) -> None:
        """Raise InputError where two ranks have the same numbers: one's file is the other's.

        A sample tells ranks apart; only those that it doesn't are compared whole. Nothing else in
        a file says whose it is. Ranks of zeros alone may well be the same.
        """
        seen: dict[bytes, int] = {}
        for rank, states in enumerate(self._states):
            moments = [state["exp_avg_sq"] for state in states]
            samples = [flat[:: flat.numel() // 1024 + 1].contiguous() for flat in moments]
            if not any(bool(sample.any()) for sample in samples):
                continue
            key = b"".join(sample.view(torch.uint8).numpy().tobytes() for sample in samples)
            other = seen.setdefault(key, rank)
            if other != rank and all(
                torch.equal(flat, state["exp_avg_sq"])
                for flat, state in zip(moments, self._states[other], strict=True)
            ):
                raise InputError(
                    f"{self.path}: the files of ranks {other} and {rank} hold the same numbers, so "
                    "one is a copy of the other: copy all of them again"
                )

    def _flat(self, part: _Stretch) -> Tensor:
        flat: Tensor = self._states[part.rank][part.index]["exp_avg_sq"]
        if part.start < 0 or part.length < 0 or part.start + part.length > flat.numel():
            raise InputError(
                f"{self.path}: rank {part.rank} has {flat.numel()} elements of group {part.index}, "
                f"not {part.start} to {part.start + part.length}: copy its file again"
            )
        return flat

    def _flat_stretches(self) -> Iterator[tuple[str, list[_Stretch]]]:
        """Yield the stretches in stages 1 and 2."""
        mappings = [rank.get("param_slice_mappings") for rank in self._ranks]
        if any(each is not None for each in mappings):
            for index, shapes in enumerate(self._shapes):
                parts = {name: list(self._mapped(mappings, index, name)) for name in shapes}
                self._refuse_overlaps(part for each in parts.values() for part in each)
                yield from parts.items()
            return
        paddings = self._ranks[0].get("param_alignment_paddings")
        for index, shapes in enumerate(self._shapes):
            ends = [states[index]["exp_avg_sq"].numel() for states in self._states]
            after = paddings[index] if paddings is not None else [0] * len(shapes)
            offset = 0
            for (name, shape), padding in zip(shapes.items(), after, strict=True):
                yield name, list(_cut(index, offset, shape.numel(), ends))
                offset += shape.numel() + padding
            align = 2 * len(self._ranks)
            if math.ceil(offset / align) != math.ceil(sum(ends) / align):
                raise InputError(
                    f"{self.path}: group {index} has {sum(ends)} elements, and its parameters "
                    f"{offset}: the files are not of one checkpoint; copy all of them again"
                )

    def _mapped(self, mappings: Sequence[Any], index: int, name: str) -> Iterator[_Stretch]:
        for rank, mapping in enumerate(mappings):
            address = mapping[index].get(name)
            if address is not None:
                start, length = getattr(address, "start", None), getattr(address, "numel", None)
                if type(start) is not int or type(length) is not int:
                    raise InputError(f"{self.path}: the place of {name!r} is damaged")
                yield _Stretch(rank, index, start, length)

    def _refuse_overlaps(self, parts: Iterable[_Stretch]) -> None:
        """Raise InputError where two parts of a rank's vector have elements in common."""
        ends: dict[int, int] = {}
        for part in sorted(parts, key=lambda each: each.start):
            if part.start < ends.get(part.rank, 0):
                raise InputError(
                    f"{self.path}: parts of rank {part.rank}'s group {part.index} overlap, so its "
                    "file is damaged: copy it again"
                )
            ends[part.rank] = part.start + part.length

    def _stage3_stretches(self) -> Iterator[tuple[str, list[_Stretch]]]:
        """Yield the stretches in stage 3: a parameter's parts are at one place on all ranks."""
        world = len(self._ranks)
        lengths = [state["exp_avg_sq"].numel() for state in self._states[0]]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        offset = 0
        for shapes in self._shapes:
            for name, shape in shapes.items():
                part = math.ceil(shape.numel() / world)
                index = max((i for i, start in enumerate(starts) if start <= offset), default=0)
                start = offset - starts[index]
                yield (
                    name,
                    [
                        _Stretch(rank, index, start, length)
                        for rank in range(world)
                        if (length := min(part, shape.numel() - rank * part)) > 0
                    ],
                )
                offset += part
        if offset != sum(lengths):
            raise InputError(
                f"{self.path}: a rank has {sum(lengths)} elements, and its part of the parameters "
                f"is {offset}: the files are not of one checkpoint; copy all of them again"
            )


def _cut(index: int, offset: int, length: int, ends: Sequence[int]) -> Iterator[_Stretch]:
    """Yield the stretches of ``length`` elements from ``offset`` on in the ranks' joined vectors,
    ``ends`` elements long each.
    """
    before = 0
    for rank, size in enumerate(ends):
        start, end = max(offset, before), min(offset + length, before + size)
        if start < end:
            yield _Stretch(rank, index, start - before, end - start)
        before += size


def _shard_files(path: Path) -> list[Path]:
    """Return one file per rank, in order."""
    by_rank: dict[int, Path] = {}
    for file in sorted(path.glob("*_optim_states.pt")):
        match = _SHARD.fullmatch(file.name)
        if match is None:
            raise InputError(
                f"{path}: {file.name} is of a run with split experts, which is not read here: "
                "measure the model with tierhints collect"
            )
        if int(match[2]) != 0:
            raise InputError(
                f"{path}: {file.name} is of a tensor-parallel run, whose slices are not put "
                "together here: convert it with DeepSpeed's ds_to_universal, and give its folder"
            )
        if int(match[1]) in by_rank:
            raise InputError(f"{path} has two files of rank {match[1]}: keep those of one run")
        by_rank[int(match[1])] = file
    missing = set(range(max(by_rank) + 1)) - by_rank.keys()
    if missing:
        raise InputError(f"{path} has no optimizer file of rank {min(missing)}: copy all of them")
    return [by_rank[rank] for rank in sorted(by_rank)]


def _read_shapes(path: Path) -> list[Mapping[str, torch.Size]]:
    """Return name -> shape for each group, in the order of its vector."""
    file = next((path / name for name in _MODEL_STATES if (path / name).is_file()), None)
    if file is None:
        raise InputError(
            f"{path} has optimizer files and no {_MODEL_STATES[0]}, which names the parameters: "
            "copy the whole folder (of a pipeline-parallel run it has none: convert that with "
            "DeepSpeed's ds_to_universal)"
        )
    document = load_torch(file, where=file, inert=PACKAGES)
    shapes = document.get("param_shapes") if isinstance(document, Mapping) else None
    groups = [shapes] if isinstance(shapes, Mapping) else shapes
    if not isinstance(groups, list) or not all(
        isinstance(group, Mapping)
        and all(
            isinstance(name, str) and isinstance(shape, torch.Size) for name, shape in group.items()
        )
        for group in groups
    ):
        raise InputError(
            f"{file} doesn't name the parameters (no param_shapes): it is of a pipeline-parallel "
            "run, or of DeepSpeed before 0.4; convert it with DeepSpeed's ds_to_universal"
        )
    return groups


def _read_shard(file: Path) -> Mapping[str, Any]:
    document = load_torch(file, where=file, inert=PACKAGES)
    state = document.get("optimizer_state_dict") if isinstance(document, Mapping) else None
    if not isinstance(state, Mapping):
        raise InputError(f"{file} has no optimizer_state_dict: it is no file of DeepSpeed's")
    return state


def _partition_counts(state: Mapping[str, Any]) -> list[int]:
    count = state.get("partition_count")
    counts = count if isinstance(count, list | tuple) else [count]
    return [each for each in counts if type(each) is int]


def _base_state(
    state: Mapping[str, Any], path: Path
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the states of a rank's flat vectors, and the settings of each."""
    base = state.get("optimizer_state_dict", state.get("base_optimizer_state"))
    if isinstance(base, list):  # elastic checkpoints: the states alone, without padding
        return base, []
    try:
        numbered = [(number, group) for group in base["param_groups"] for number in group["params"]]
        states = [base["state"][number] for number, _ in numbered]
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(
            f"{path} keeps no base_optimizer_state that is read here ({type(error).__name__}): "
            "give a checkpoint of ZeRO stage 1, 2 or 3"
        ) from error
    return states, [group for _, group in numbered]
