"""What other threads want done while the model runs: it is done by the thread that runs it, where
nothing is being computed with the weights that move, that is before a module begins.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import PlacementError
from ..residency.residency import Residency

if TYPE_CHECKING:
    from .forwards import Forwards

_LOOK_SECONDS = 0.01
"""After so long a thread that waits looks whether the forward is over and nobody will come by."""
_Result = TypeVar("_Result")


class Requests:
    """Work for the thread that runs the model; done at once where none does."""

    def __init__(self, forwards: "Forwards", residency: Residency) -> None:
        self._forwards = forwards
        self._residency = residency
        self._waiting: deque[_Request] = deque()
        self._postponed = False

    def do(self, work: Callable[[], _Result]) -> _Result:
        """Do something with the weights, before the next module of a forward that runs in another
        thread; returns its result, or raises what it raised.

        Blocks for as long as the module that runs now takes. Raises PlacementError in a child of
        a fork, and where the caller itself is in a forward.
        """
        forwards = self._forwards
        request = _Request(work)
        with forwards.lock:
            forwards.refuse_other_processes()
            if not forwards.is_running or forwards.is_mine:
                forwards.check_idle()
                return work()
            forwards.stop_everywhere()
            self._waiting.append(request)
        try:
            while not request.done.wait(_LOOK_SECONDS):
                with forwards.lock:
                    if request in self._waiting and not forwards.is_running:
                        self._waiting.remove(request)
                        forwards.check_idle()
                        return work()
        except BaseException:
            with forwards.lock:
                if request in self._waiting:
                    self._waiting.remove(request)
            raise
        if request.error is not None:
            raise request.error
        result: _Result = request.result
        return result

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Let what is waiting wait on, for as long as a compiled step knows where weights are."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def serve(self) -> None:
        """Do what is waiting, in the thread that runs the model and holds the lock. What fails is
        raised where it was asked for.
        """
        while self._waiting and not self._postponed:
            request = self._waiting.popleft()
            try:
                with self._residency.holding():
                    request.result = request.work()
            except Exception as error:
                request.error = error
            except BaseException:  # Ctrl-C: it is the model's thread that is to hear of it
                request.error = PlacementError("the model's thread was interrupted: ask again")
                raise
            finally:
                self._forwards.follow_plan()
                request.done.set()


class _Request:
    """Something to do, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
