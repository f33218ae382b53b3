"""How training ends before its last step: by a signal, or by a failure that a setting avoids."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from lib.config import TrainConfig
from lib.errors import InputError

from .distributed import log
from .tokenizer import first_line


class StopSignals:
    """Turns SIGINT and SIGTERM into a wish to stop after the step; under torchrun both may come,
    so the first counts.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            log(f"\n{signal.Signals(number).name}: stopping after this step")
        self.received = True


@contextmanager
def plain_step_errors(config: TrainConfig) -> Iterator[None]:
    """Turn failures of a step that a setting avoids into InputErrors that name the setting."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the GPU's memory is too small for TRAIN_BATCH_SIZE={config.batch_size}: halve it and "
            f"double TRAIN_ACCUMULATION (now {config.accumulation})"
        ) from error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        raise InputError(
            "torch.compile can't compile the model on this machine: install a C++ compiler, or set "
            f"TRAIN_COMPILE=n ({first_line(error)})"
        ) from error
