"""The operators of ``tierhints`` in C++ for a CPU, built once with the user's compiler.

A build takes a minute and is kept in the user's cache folder, under a name that says what it
was made of: sources, flags, torch. Nothing of Python is linked: any Python with its torch loads it.
A wheel may bring one along, in this folder and under the same name (``setup.py``).
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...files import cache_folder

VARIABLE = "TIERHINTS_NATIVE"
"""0: do without the extension. One of ``INSTRUCTIONS``: those, in the place of the best here."""
INSTRUCTIONS = ("portable", "avx2", "avx512")
FLAGS_VARIABLE = "TIERHINTS_NATIVE_FLAGS"
"""More flags for the compiler, such as those of a sanitizer."""
_FOLDER = Path(__file__).parent
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",  # the reference rounds after each operation
    "-fvisibility=hidden",
    "-Wno-psabi",
)


@dataclass(frozen=True, slots=True)
class Native:
    """The extension's ``library``, or why there is none."""

    library: Path | None
    reason: str = ""


@cache
def load_native() -> Native:
    """Load the extension into this process, building it first where that wasn't done yet."""
    asked = os.environ.get(VARIABLE, "")
    if asked == "0":
        return Native(None, f"{VARIABLE} is 0")
    if asked and asked not in INSTRUCTIONS:
        raise InputError(f"{VARIABLE} is {asked!r}: set 0, {' or '.join(INSTRUCTIONS)}, or nothing")
    native = obtain_native()
    if native.library is not None:
        operators: Any = torch.ops  # its methods aren't typed
        try:
            operators.load_library(str(native.library))
        except OSError as error:
            return Native(None, f"it could not be loaded: {_first_error(str(error))}")
    return native


def obtain_native() -> Native:
    """Find the extension for this torch: where the package lies, or in the user's cache, where it
    is built if it isn't there yet.
    """
    name = _library_name()
    if (_FOLDER / name).exists():
        return Native(_FOLDER / name)
    library = cache_folder() / "native" / name
    try:
        if not library.exists():
            compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
            if compiler is None:
                return Native(None, "no C++ compiler (install g++, or name one in $CXX)")
            _build(compiler, library)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return Native(None, f"it could not be built: {_first_error(output)}")
    return Native(library)


def _library_name() -> str:
    """Return the name of a build of these sources and flags for this torch."""
    digest = hashlib.sha256()
    for part in (*_FLAGS, os.environ.get(FLAGS_VARIABLE, ""), torch.__version__):
        digest.update(part.encode() + b"\0")
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    return f"{digest.hexdigest()[:16]}.so"


def _build(compiler: str, library: Path) -> None:
    """Build the extension; another process that does so meanwhile is waited for."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return
        print(
            "tierhints: building the kernels of compressed weights (once, a minute)",
            file=sys.stderr,
        )
        folder = library.with_suffix(".build")
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
        folder.mkdir()
        try:
            _compile(compiler, folder / library.name)
            (folder / library.name).rename(library)
        finally:
            shutil.rmtree(folder)


def _compile(compiler: str, made: Path) -> None:
    """Compile the sources beside ``made``, at the same time, and link them."""
    from torch.utils.cpp_extension import include_paths, library_paths

    command = [compiler, *_FLAGS, *shlex.split(os.environ.get(FLAGS_VARIABLE, ""))]
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    objects = {
        path: str(made.with_name(f"{path.stem}.o")) for path in _sources() if path.suffix == ".cpp"
    }
    with ThreadPoolExecutor() as threads:
        compilations = [
            threads.submit(_run, [*command, *includes, "-c", str(path), "-o", target])
            for path, target in objects.items()
        ]
        for compilation in compilations:
            compilation.result()
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    _run([*command, "-shared", *objects.values(), *libraries, "-o", str(made)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _sources() -> list[Path]:
    return sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cpp", ".h", ".inl"))


def _first_error(output: str) -> str:
    lines = output.strip().splitlines() or ["?"]
    return next((line for line in lines if "error" in line), lines[-1])
