"""What a compared system is, ours or a peer: one class in one file of this folder, registered.

Everything is imported inside: what a system doesn't need must not count in its memory. ``prepare``
runs once and without a limit: no system is charged for converting the checkpoint to its own files.
docs/extending.md has an example; tests/integration/test_every_system.py is what each passes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lib.errors import InputError
from lib.registry import Registry

DEVICES = ("cpu", "cuda")
"""A GPT-2 on disk under limits of host memory; a Llama in host memory under limits of a GPU's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is to load. ``folder`` is the system's own, for its files; ``limit_bytes`` of
    host memory or, on a GPU, of its own.
    """

    checkpoint: Path
    folder: Path
    limit_bytes: int | None
    reserve_bytes: int
    budget_bytes: int | None
    machine: Path | None
    device: str = "cpu"
    hints: Path | None = None
    """The model's, where there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model ready to generate. ``moved_bytes`` counts the weight bytes brought so far, where a
    system says so; ``bytes_per_pass`` is what one moves in each pass by design. ``unit_bytes``: the
    transfers that it makes. ``warm_up_passes`` it wants before it is measured. ``facts`` go into
    the document.
    """

    model: Any
    moved_bytes: Callable[[], int] | None = None
    bytes_per_pass: int | None = None
    unit_bytes: int | None = None
    warm_up_passes: int = 0
    facts: Callable[[], dict[str, Any]] = dict
    after_warm_up: Callable[[], None] = lambda: None


class System(ABC):
    """A way of running the model, on some of ``DEVICES``. ``peer``: not ours; ``num_tokens``
    are timed unless the user says otherwise; ``exact``: its logits must be the resident model's bit
    for bit; ``limits_mib``: those that it is run under, None: all; ``module``: what must be
    installed, and ``install`` how; ``needs_preparing``: it has ``prepare``; ``drafts``: tokens come
    in windows, as many as a trained model's draft has right.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]
    peer: ClassVar[bool] = True
    limits_mib: ClassVar[tuple[int, ...] | None] = None
    num_tokens: ClassVar[int] = 12
    exact: ClassVar[bool] = False
    full_precision: ClassVar[bool] = True
    drafts: ClassVar[bool] = False
    module: ClassVar[str | None] = None
    install: ClassVar[str] = ""
    needs_preparing: ClassVar[bool] = False

    @abstractmethod
    def load(self, task: Task) -> Loaded:
        """Return the model ready to generate, within the limit that this process is under."""

    def prepare(self, task: Task) -> None:
        """Make the system's own files in the task's folder."""
        raise NotImplementedError(f"{self.name} needs preparing, and has no prepare")

    def is_installed(self) -> bool:
        """Say whether its package can be imported."""
        return self.module is None or find_spec(self.module) is not None


SYSTEMS: Registry[System] = Registry("system")
"""By name and device; on each device the resident model is the first."""
SystemClass = TypeVar("SystemClass", bound=type[System])


def register_system(system: SystemClass) -> SystemClass:
    """Let a class be compared on its devices: a decorator."""
    made = system()
    for device in system.devices:
        if device not in DEVICES:
            raise InputError(
                f"system {system.name} is for device {device!r}; allowed: {', '.join(DEVICES)}"
            )
        SYSTEMS.add(f"{system.name} on {device}", made)
    return system


def systems_on(device: str) -> tuple[System, ...]:
    """Return what is compared on a device, the resident model first."""
    return tuple(dict.fromkeys(each for each in SYSTEMS.values() if device in each.devices))


def anonymous_bytes() -> int:
    """Return this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon line")
