"""torch.distributed.checkpoint folders: torchtitan, OLMo-core, accelerate with FSDP2.

``.metadata`` is a pickle of torch's ``Metadata``: name -> size and chunks, and for each chunk the
file, offset and length of a small file of torch.save. The optimizer's names are

    [<prefix>.]state.<parameter>.<key>
    [<prefix>.]param_groups.<group or parameter>.<setting>

One chunk is read at a time, without a process group, whatever the number of ranks that wrote it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from .interface import OptimizerFile, SavedMoment, is_plain_name, register_format
from .names import match_names
from .pickles import load_records, load_torch, reading
from .states import (
    check_keys,
    check_moment,
    describe_kind,
    read_beta2,
    read_step,
    refuse_keys,
    shown,
)

_METADATA = ".metadata"
_FOLDERS = ("optimizer_0", "optimizer", "model_and_optim")
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_NAMES = (
    *((_METADATA_MODULE, name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata",
        "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
)  # fmt: skip
"""All that a .metadata names, in torch 2.1 to 2.13 and in OLMo-core."""
_SLACK = 1 << 16
"""Bytes that torch.save adds to a tensor's own."""
_MAX_VALUE = 1 << 24
"""Bytes of a setting; a list of all groups has the parameters' names in it."""
_STATE = "state."
_GROUPS = "param_groups."
_STATE_AT = re.compile(r"(?<![^.])state\.")


@register_format
class DistributedCheckpoint(OptimizerFile):
    """A folder with ``.metadata`` and ``__<rank>_<n>.distcp`` files."""

    format = "torch distributed checkpoint"

    @classmethod
    def find(cls, path: Path) -> Path | None:
        """Return the folder: this one, or where accelerate and OLMo-core put it."""
        folders = (path, *(path / name for name in _FOLDERS))
        return next((each for each in folders if (each / _METADATA).is_file()), None)

    def __init__(self, path: Path, *, beta2: float | None = None) -> None:
        self.path = path
        self._beta2 = beta2
        self._index = _read_index(path)
        self._prefix = self._find_prefix()
        self._states = self._read_states()
        self._settings = self._read_settings()
        for name, keys in self._states.items():
            check_keys(keys, name, path)
        kept = [key for keys in self._states.values() for key in keys]
        self.kind = describe_kind(self._settings.values(), kept)

    def find_moments(self, model: nn.Module) -> dict[str, SavedMoment]:
        """Match the names of the folder with the model's."""
        return match_names(
            model, {name: self._moment(name) for name in self._states}, path=self.path
        )

    def _moment(self, name: str) -> SavedMoment:
        key = f"{self._prefix}{_STATE}{name}.exp_avg_sq"
        step_key = f"{self._prefix}{_STATE}{name}.step"
        state = {"step": self._value(step_key)} if step_key in self._index else {}
        group = self._settings.get(name, {})

        def read() -> Tensor:
            return check_moment(self._tensor(key), name, self.path)

        return SavedMoment(
            shape=self._size(key),
            steps=(read_step(state, group, name, self.path),),
            beta2=read_beta2(group, self._beta2, self.path),
            read=read,
        )

    def _find_prefix(self) -> str:
        """Return what comes before ``state.`` in the optimizer's names."""
        for name in self._index:
            if "state.exp_avg_sq." in f".{name}":
                raise InputError(
                    f"{self.path} is Megatron's: it stacks the layers and fuses projections, which "
                    "is not taken apart here; measure the model with tierhints collect"
                )
        moments = [name for name in self._index if name.endswith(".exp_avg_sq")]
        prefixes = {name[: at.start()] for name in moments if (at := _STATE_AT.search(name))}
        if not prefixes:
            parts = {part for name in self._index for part in name.split(".")}
            refuse_keys(parts)
            some = ", ".join(list(self._index)[:3])
            raise InputError(
                f"{self.path} holds no second moment (it has {some}, ...): give the folder with "
                "the optimizer's state, of a run with AdamW"
            )
        if len(prefixes) > 1:
            raise InputError(
                f"{self.path} has the states of several optimizers ({', '.join(sorted(prefixes))}):"
                " which one trained the model is not known; measure it with tierhints collect"
            )
        return prefixes.pop()

    def _read_states(self) -> dict[str, set[str]]:
        """Return parameter -> keys of its state."""
        states: dict[str, set[str]] = {}
        start = f"{self._prefix}{_STATE}"
        for name in self._index:
            if name.startswith(start):
                parameter, _, key = name.removeprefix(start).rpartition(".")
                states.setdefault(parameter, set()).add(key)
        return states

    def _read_settings(self) -> dict[str, dict[str, Any]]:
        """Return parameter -> settings of its group."""
        start = f"{self._prefix}{_GROUPS}"
        wanted = ("betas", "amsgrad", "weight_decay", "decoupled_weight_decay", "step", "params")
        groups: dict[str, dict[str, Any]] = {}
        for name in self._index:
            group, _, setting = name.removeprefix(start).rpartition(".")
            if name.startswith(start) and setting in wanted:
                groups.setdefault(group, {})[setting] = self._value(name)
        whole = self._value(start[:-1]) if start[:-1] in self._index else None
        if isinstance(whole, list):  # torch before 2.4 kept the list of groups in one piece
            groups = {str(number): dict(group) for number, group in enumerate(whole)}
        settings = {name: each for name, each in groups.items() if name in self._states}
        for each in groups.values():
            settings |= {name: each for name in each.get("params", ()) if isinstance(name, str)}
        return settings

    def _size(self, name: str) -> torch.Size:
        size = getattr(self._index[name][0], "size", None)
        if type(size) is not torch.Size:
            raise InputError(f"{self.path}: {name!r} is no tensor: the folder is damaged")
        return size

    def _value(self, name: str) -> Any:
        """Read something that is stored whole: a setting, or a count."""
        entry, chunks = self._index[name]
        if hasattr(entry, "size"):
            if self._size(name).numel() != 1:
                raise InputError(f"{self.path}: {name!r} isn't one number: the folder is damaged")
            return self._tensor(name)
        if len(chunks) != 1:
            raise InputError(f"{self.path}: {name!r} is stored {len(chunks)} times: damaged")
        return self._load(name, next(iter(chunks.values())), _MAX_VALUE)

    def _tensor(self, name: str) -> Tensor:
        """Put a tensor together, each of its elements read once. Its size is known to be right."""
        entry, stored = self._index[name]
        size = self._size(name)
        dtype = entry.properties.state[0]
        boxes = [(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
        for offset, shape in boxes:
            ends = zip(offset, shape, size, strict=False)
            if not len(offset) == len(shape) == len(size) or any(
                start < 0 or length < 0 or start + length > end for start, length, end in ends
            ):
                raise InputError(f"{self.path}: a part of {name!r} lies outside of it: damaged")
        if sum(shape.numel() for _, shape in boxes) != size.numel():
            raise self._incomplete(name)
        whole: Tensor | None = None
        for offset, shape in boxes:
            info = stored.get(offset)
            if info is None:
                raise self._incomplete(name)
            chunk = self._load(name, info, shape.numel() * dtype.itemsize + _SLACK)
            if type(chunk) is not Tensor or chunk.shape != shape or chunk.dtype != dtype:
                raise InputError(
                    f"{self.path}: a part of {name!r} isn't {tuple(shape)} of {dtype}: damaged"
                )
            if shape == size:
                return chunk
            if whole is None:
                whole = check_moment(torch.full(size, torch.nan, dtype=dtype), name, self.path)
            place = whole
            for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
                place = place.narrow(dim, start, length)
            if not bool(place.isnan().all()):
                raise InputError(f"{self.path}: parts of {name!r} overlap: the folder is damaged")
            place.copy_(chunk)
        if whole is None:
            raise self._incomplete(name)
        return whole

    def _load(self, name: str, info: Any, max_bytes: int) -> Any:
        """Read one stored piece, by its place in a file of this folder."""
        file, offset, length = (
            getattr(info, key, None) for key in ("relative_path", "offset", "length")
        )
        if not (
            isinstance(file, str)
            and is_plain_name(file)
            and isinstance(offset, int)
            and isinstance(length, int)
            and offset >= 0 < length
        ):
            raise InputError(
                f"{self.path}: {name!r} would be in {shown(file)!r} at {shown(offset)}, which is "
                "no place in a file of this folder: refused"
            )
        if length > max_bytes:
            raise InputError(
                f"{self.path}: {name!r} would take {length} bytes, and has {max_bytes} at most: "
                "the folder is damaged"
            )
        if getattr(info, "transform_descriptors", None):
            raise InputError(
                f"{self.path}: {name!r} is stored compressed or encrypted: save without storage "
                "extensions"
            )
        path = self.path / file
        with reading(path):
            if path.resolve().parent != self.path.resolve():
                raise InputError(
                    f"{path} is a link to outside of the folder: refused; copy the file itself"
                )
            if not path.is_file() or path.stat().st_size < offset + length:
                raise InputError(
                    f"{path} is missing or truncated: {name!r} should be there; copy it again"
                )
            with path.open("rb") as stream:
                stream.seek(offset)
                data = stream.read(length)
        return load_torch(data, where=f"{path} ({name!r})")

    def _incomplete(self, name: str) -> InputError:
        return InputError(f"{self.path} doesn't hold all of {name!r}: copy the whole folder again")


Chunks = dict[torch.Size | None, Any]


def _read_index(folder: Path) -> dict[str, tuple[Any, Chunks]]:
    """Return name -> entry of ``state_dict_metadata``, and its stored pieces by offset."""
    metadata = load_records(folder / _METADATA, _NAMES)
    with reading(folder / _METADATA):
        chunks: dict[str, Chunks] = {}
        for index, info in metadata.storage_data.items():
            offset = getattr(index, "offset", None)
            place = None if offset is None else torch.Size(offset)
            if type(index.fqn) is str:
                chunks.setdefault(index.fqn, {})[place] = info
        entries: Mapping[str, Any] = metadata.state_dict_metadata
        return {name: (entry, chunks.get(name, {})) for name, entry in entries.items()
                if type(name) is str}  # fmt: skip
