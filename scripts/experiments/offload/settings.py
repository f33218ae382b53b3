"""What is compared on which device: a GPT-2 on disk for a CPU, a Llama in host memory for a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

from lib.errors import InputError
from lib.units import GIB, MIB
from scripts.experiments.offload.peers import System, systems_on
from scripts.experiments.offload.shapes import GPT2_MEDIUM, LLAMA_7B, TOY, TOY_LLAMA, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A device's benchmark. ``limits_mib`` limit host memory, or a GPU's; ``reserve_mib``: what
    our weights leave of it. ``link`` and ``page_cache`` say
    in the document how things were done.
    """

    device: str
    shape: Shape
    limits_mib: tuple[int, ...]
    toy: Shape
    toy_limits_mib: tuple[int, ...]
    reserve_mib: int
    timeout_seconds: float
    cold: bool
    link: str
    page_cache: str

    @property
    def systems(self) -> tuple[System, ...]:
        """What is compared: the resident model, then ours and peers."""
        return systems_on(self.device)

    @property
    def resident(self) -> System:
        """The model without a limit."""
        return self.systems[0]


CPU_SETTING = Setting(
    device="cpu",
    shape=GPT2_MEDIUM,
    limits_mib=(1500, 1100, 900, 700, 600),
    toy=TOY,
    toy_limits_mib=(700,),
    reserve_mib=64,
    timeout_seconds=300.0,
    cold=True,
    link="FileProbe before, between and after the segments of each run",
    page_cache="files dropped before each run",
)
CUDA_SETTING = Setting(
    device="cuda",
    shape=LLAMA_7B,
    limits_mib=(6 * GIB // MIB,),
    toy=TOY_LLAMA,
    toy_limits_mib=(GIB // MIB,),
    reserve_mib=256,
    timeout_seconds=900.0,
    cold=False,
    link="pinned copies to the device before, between and after the segments of each run",
    page_cache="left alone: nothing is read from the disk while generating",
)
SETTINGS = {setting.device: setting for setting in (CPU_SETTING, CUDA_SETTING)}


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def choose_setting(device: str, has_cuda: Callable[[], bool] = _has_cuda) -> Setting:
    """Return the setting of "cpu", "cuda" or "auto" (a GPU where there is one).

    Raises InputError for a GPU that isn't there.
    """
    if device != "cpu" and has_cuda():
        return CUDA_SETTING
    if device == "cuda":
        raise InputError(
            "--device cuda: torch sees no CUDA device here; allowed: cpu, or auto, which takes a "
            "GPU where there is one"
        )
    return CPU_SETTING
