"""Reading pickles that anyone may have written: no code that they name is imported or run.

A pickle can name any function of any module and have it called. Here a name is one of a list, or
the file is refused. What stands for a name is not the named thing but a class of our own that keeps
its arguments and does nothing (``Inert``), or a few constructors of torch that do no more. Files of
torch.save go through torch's own weights_only unpickler, which knows tensors and plain containers;
names of libraries that need not be installed (DeepSpeed's enums) are admitted as ``Inert``.

What is promised is that nothing runs, and that memory stays within the sizes of the files and of
the model, some dozens of times the size of a pickle aside. Time isn't: a pickle can be long.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError

_MAX_PICKLE = 64 << 20
"""Bytes of a pickle without its tensors; one of a thousand parameters takes some 100 kB."""
_MAX_INDEX = 1 << 30
"""Bytes of a file of records."""
_REAL: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
}


class Inert:
    """Stands for an object of a class that isn't imported. ``args``: what it was made of; its state
    becomes attributes.
    """

    args: tuple[Any, ...] = ()

    def __new__(cls, *args: Any) -> "Inert":
        """Keep the arguments."""
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Keep a dataclass's fields as attributes, and any other state as ``state``."""
        if isinstance(state, dict) and all(isinstance(key, str) for key in state):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state


def load_torch(source: Path | bytes, *, where: object, inert: Collection[str] = ()) -> Any:
    """Load what torch.save wrote, tensors mapped from the file (from ``bytes``: copied).

    ``inert``: packages of which any name may occur, replaced by ``Inert``. Raises InputError for a
    file that is damaged, and one that names anything else; nothing of it has run then.

    torch keeps one list of allowed classes per process. While a file is read the inert names are on
    it, for other threads' torch.load too; and a class that the process itself has put on it
    (torch.serialization.add_safe_globals) is built here as it is anywhere.
    """
    if not zipfile.is_zipfile(io.BytesIO(source) if isinstance(source, bytes) else source):
        raise InputError(
            f"{where} is not a whole file of torch.save (truncated, another format, or written by "
            "torch before 1.6): copy it again, or save it again"
        )
    with reading(where):
        _check_archive(source, where)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(_stream(source))
    foreign = sorted(name for name in named if name.partition(".")[0] not in inert)
    if foreign:
        raise InputError(
            f"{where} is refused: its pickle names {foreign[0]}, which is no tensor and no plain "
            "container; nothing of it was run. Save state_dict()s alone"
        )
    stands_for: list[Any] = [(type("Inert", (Inert,), {}), name) for name in named]
    with reading(where), torch.serialization.safe_globals(stands_for):
        return torch.load(
            _stream(source), map_location="cpu", mmap=isinstance(source, Path), weights_only=True
        )


def load_records(path: Path, names: Collection[tuple[str, str]]) -> Any:
    """Load a plain pickle of records: ``names`` (module, class) become ``Inert``; torch's sizes,
    dtypes and layouts are known. Raises InputError for a damaged file and any other name.
    """
    with reading(path):
        if path.stat().st_size > _MAX_INDEX:
            raise InputError(f"{path} has more than {_MAX_INDEX} bytes: it is no index of torch's")
        data = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(data):
            # The unpickler makes its table as long as the largest index that it is told.
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
                raise InputError(f"{path} is damaged: it counts {argument} objects")
        return _Records(io.BytesIO(data), path, names).load()


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn whatever a file's content makes its reader raise into the error for a damaged file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise damaged(where, error) from error


def damaged(where: object, error: BaseException) -> InputError:
    """Return the error for a file that can't be read."""
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return InputError(
        f"{where} is damaged or truncated ({type(error).__name__}: {reason}): copy it again"
    )


class _Records(pickle.Unpickler):
    def __init__(self, file: Any, path: Path, names: Collection[tuple[str, str]]) -> None:
        super().__init__(file)
        self._path = path
        # Classes of this load alone: whatever a pickle does to one is gone with it.
        self._known: Mapping[tuple[str, str], Any] = _REAL | {
            name: type(name[1], (Inert,), {}) for name in (*names, *_LAYOUT)
        }

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get((module, name))
        if found is None and module == "torch":
            dtype = vars(torch).get(name)  # getattr would import torch's lazy modules
            found = dtype if isinstance(dtype, torch.dtype) else None
        if found is None:
            raise InputError(
                f"{self._path} is refused: its pickle names {module}.{name}, which has no place "
                "there; nothing of it was run"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise InputError(f"{self._path} is refused: its pickle refers to something outside of it")


_LAYOUT = (("torch.serialization", "_get_layout"),)


def _check_archive(source: Path | bytes, where: object) -> None:
    """Refuse records that unpack to more than the file has, and a pickle of unlikely length."""
    with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
        for record in archive.infolist():
            stored = record.compress_type == zipfile.ZIP_STORED
            if not stored or record.file_size != record.compress_size:
                raise InputError(f"{where} has compressed records, as torch.save writes none")
            if record.filename.endswith(".pkl") and record.file_size > _MAX_PICKLE:
                raise InputError(f"{where}: its pickle has more than {_MAX_PICKLE} bytes: refused")


def _stream(source: Path | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)
