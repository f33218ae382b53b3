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
from .interface import OptimizerFile, SavedMoment, register_format
from .names import match_names
from .pickles import damaged, load_records, load_torch
from .states import check_keys, check_moment, describe_kind, read_beta2, read_step, refuse_keys

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

    def moments(self, model: nn.Module) -> dict[str, SavedMoment]:
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
            settings |= {str(name): each for name in each.get("params", ())}
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
            return self._tensor(name)
        if len(chunks) != 1:
            raise InputError(f"{self.path}: {name!r} is stored {len(chunks)} times: damaged")
        return self._load(name, next(iter(chunks.values())))

    def _tensor(self, name: str) -> Tensor:
        """Put a tensor together, each of its elements read once."""
        entry, stored = self._index[name]
        size = self._size(name)
        dtype = _dtype(entry)
        boxes = _boxes(entry)
        if sum(shape.numel() for _, shape in boxes) != size.numel():
            raise self._incomplete(name)
        whole: Tensor | None = None
        for offset, shape in boxes:
            info = stored.get(offset)
            if info is None:
                raise self._incomplete(name)
            chunk = self._load(name, info)
            if not isinstance(chunk, Tensor) or chunk.shape != shape:
                raise InputError(f"{self.path}: a part of {name!r} isn't {tuple(shape)}: damaged")
            if shape == size:
                return chunk
            if whole is None:
                # What overlapping parts would leave out stays NaN, and is refused as not finite.
                whole = torch.full(size, float("nan"), dtype=dtype or chunk.dtype)
            place = whole
            for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
                if start + length > size[dim]:
                    raise self._incomplete(name)
                place = place.narrow(dim, start, length)
            place.copy_(chunk)
        if whole is None:
            raise self._incomplete(name)
        return whole

    def _load(self, name: str, info: Any) -> Any:
        """Read one stored piece, by its place in a file of this folder."""
        file, offset, length = (
            getattr(info, key, None) for key in ("relative_path", "offset", "length")
        )
        if not (
            isinstance(file, str)
            and file == Path(file).name
            and isinstance(offset, int)
            and isinstance(length, int)
            and offset >= 0 < length
        ):
            raise InputError(
                f"{self.path}: {name!r} would be in {file!r:.80} at {offset!r:.20}, which is no "
                "place in a file of this folder: refused"
            )
        if getattr(info, "transform_descriptors", None):
            raise InputError(
                f"{self.path}: {name!r} is stored through {info.transform_descriptors}: save "
                "without storage extensions"
            )
        path = self.path / file
        try:
            if not path.is_file() or path.stat().st_size < offset + length:
                raise InputError(
                    f"{path} is missing or truncated: {name!r} should be there; copy it again"
                )
            with path.open("rb") as stream:
                stream.seek(offset)
                data = stream.read(length)
        except OSError as error:
            raise damaged(path, error) from error
        return load_torch(data, where=f"{path} ({name!r})")

    def _incomplete(self, name: str) -> InputError:
        return InputError(f"{self.path} doesn't hold all of {name!r}: copy the whole folder again")


Chunks = dict[tuple[int, ...] | None, Any]


def _read_index(folder: Path) -> dict[str, tuple[Any, Chunks]]:
    """Return name -> entry of ``state_dict_metadata``, and its stored pieces by offset."""
    metadata = load_records(folder / _METADATA, _NAMES)
    try:
        chunks: dict[str, Chunks] = {}
        for index, info in metadata.storage_data.items():
            offset = getattr(index, "offset", None)
            place = None if offset is None else tuple(offset)
            chunks.setdefault(index.fqn, {})[place] = info
        entries: Mapping[str, Any] = metadata.state_dict_metadata
        return {str(name): (entry, chunks.get(name, {})) for name, entry in entries.items()}
    except (AttributeError, TypeError) as error:
        raise damaged(folder / _METADATA, error) from error


def _boxes(entry: Any) -> list[tuple[tuple[int, ...], torch.Size]]:
    """Return offset and shape of each chunk."""
    try:
        return [(tuple(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
    except (AttributeError, TypeError) as error:
        raise damaged("a chunk list of .metadata", error) from error


def _dtype(entry: Any) -> torch.dtype | None:
    state = getattr(getattr(entry, "properties", None), "state", None)
    found = state[0] if isinstance(state, tuple) and state else None
    return found if isinstance(found, torch.dtype) else None
