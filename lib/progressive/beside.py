"""A thread that does something over and over while its caller does something else."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch

from ..tiering.transfer.transport import Arrival


class Beside:
    """Calls a function in a thread of its own, once or more, for as long as a ``with`` lasts."""

    def __init__(self) -> None:
        self._job: _Job | None = None

    @contextlib.contextmanager
    def repeat(self, step: Callable[[], None], times: int) -> Iterator[None]:
        """Call ``step`` so many times at most; the call that runs at the end of the block is waited
        for. Then what one of them has raised is raised, unless the block has raised itself.
        """
        self.end()
        job = _Job(step, times)
        try:
            self._job = job
            threading.Thread(target=job.run, daemon=True, name="tierhints-draft").start()
            yield
        finally:
            job.end()  # its own: another thread may have begun one meanwhile
            if self._job is job:
                self._job = None
        if job.error is not None:
            raise job.error

    def end(self) -> None:
        """Let what runs come to an end. To be called again where an interrupt comes in between."""
        if (job := self._job) is not None:
            job.end()
            self._job = None


class _Job:
    def __init__(self, step: Callable[[], None], times: int) -> None:
        self.error: BaseException | None = None
        self._step, self._times = step, times
        self._inference = torch.is_inference_mode_enabled()
        self._is_over = False
        self._claims: deque[str] = deque()
        """The first to claim it decides whether it runs at all."""
        self._ended = Arrival()

    def run(self) -> None:
        """Be the thread's."""
        self._claims.append("thread")
        if self._claims[0] != "thread":
            return
        try:
            # As its caller computes: a thread begins with gradients and without inference mode.
            with torch.inference_mode(self._inference), torch.no_grad():
                for _ in range(self._times):
                    if self._is_over:
                        return
                    self._step()
        except BaseException as error:
            self.error = error
        finally:
            self._ended.set()

    def end(self) -> None:
        """Stop before the next call, and wait for the present one; any number of times."""
        self._is_over = True
        self._claims.append("caller")
        if self._claims[0] == "thread":
            self._ended.wait()
