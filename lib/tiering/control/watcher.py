"""The thread beside the model: it looks at the control file, lets time pass for the controller, and
keeps an eye on the system's memory. It decides nothing.
"""

import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import InputError
from .file import ControlFile
from .observe import Observer, sample_to_json

if TYPE_CHECKING:
    from .budget_control import BudgetControl

_POLL_SECONDS = 0.02
_TICK_SECONDS = 0.1
_SAMPLE_SECONDS = 0.5


class Watcher:
    """Looks after one ``BudgetControl``, until ``stop`` or until nobody has that any more.

    ``reserve_bytes``: memory of the system that is to stay free; None: that isn't looked at.
    """

    def __init__(
        self,
        control: "BudgetControl",
        observer: Observer,
        *,
        file: ControlFile | None,
        reserve_bytes: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._file = file
        self._observer = observer
        self._reserve_bytes = reserve_bytes
        self._clock = clock
        self._ticked_at = self._sampled_at = clock()
        self._heeds = False
        self._answers = 0
        self._said: dict[str, object] = {"request": None, "error": None, "answers": 0}
        if file is not None:
            self._write(control, file)
        stop = threading.Event()
        thread = threading.Thread(
            target=_look_after,
            args=(weakref.ref(control), self, stop),
            daemon=True,
            name="tierhints-control",
        )
        self._finish = weakref.finalize(control, _end_thread, stop, thread)
        thread.start()

    def stop(self) -> None:
        """End the thread, once it has done what it is at."""
        self._finish()

    def look(self, control: "BudgetControl") -> None:
        """Look at what has changed."""
        if self._file is not None:
            asked = self._file.read_change()
            if asked is not False:
                self._answer(control, self._file, asked)
        now = self._clock()
        if now - self._ticked_at >= _TICK_SECONDS:
            self._ticked_at = now
            control.tick()
        if now - self._sampled_at >= _SAMPLE_SECONDS:
            self._sampled_at = now
            self._sample(control, now)

    def _answer(
        self, control: "BudgetControl", file: ControlFile, asked: str | int | None | InputError
    ) -> None:
        """Do what another process asks for, and say what came of it."""
        error: Exception | None = None
        try:
            if isinstance(asked, InputError):
                raise asked
            control.request(asked)
        except Exception as refusal:  # whoever has asked is in another process
            error = refusal
        self._answers += 1
        self._said = {
            "request": None if isinstance(asked, InputError) else asked,
            "error": None if error is None else str(error),
            "answers": self._answers,
        }
        self._write(control, file)

    def _sample(self, control: "BudgetControl", now: float) -> None:
        began = time.thread_time()
        sample = self._observer.look(now)
        if self._file is not None:
            self._write(control, self._file)
        control.seconds += time.thread_time() - began
        if self._reserve_bytes is None or sample.system is None:
            return
        missing = self._reserve_bytes - sample.system.free_bytes
        if missing > 0 or self._heeds:
            self._heeds = control.hint(missing)

    def _write(self, control: "BudgetControl", file: ControlFile) -> None:
        samples = self._observer.samples
        live = sample_to_json(samples[-1]) if samples else None
        file.answer({**self._said, **control.status(), "sample": live})


def _look_after(
    control: "weakref.ref[BudgetControl]", watcher: Watcher, stop: threading.Event
) -> None:
    """Look at what has changed, until told to end or forgotten."""
    while not stop.wait(_POLL_SECONDS):
        there = control()
        if there is None:
            return
        try:
            watcher.look(there)
        except Exception as error:  # what was held before is held, and goes on
            warnings.warn(f"the controller could not act: {error}", RuntimeWarning, stacklevel=1)
        finally:
            del there


def _end_thread(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join()
