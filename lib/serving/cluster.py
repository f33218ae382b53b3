"""An endpoint on a Ray cluster: the one that this machine is part of, or one that is started here
and ends with the process.
"""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ..errors import InputError, PlacementError
from .replicas import OpenEndpoint, make_application
from .serve import KEEP_ALIVE_SECONDS, listen
from .settings import Access

_NAME = "tierhints"
_TICK_SECONDS = 0.1
_ASK_SECONDS = 5.0


class Deployed:
    """An endpoint that answers, until a signal."""

    def __init__(
        self, entrance: Any, document: Mapping[str, Any], signals: Sequence[signal.Signals]
    ) -> None:
        self.document = document
        """What it says of itself, with its ``url`` and how many ``replicas`` there are."""
        self._entrance = entrance
        self._signals = signals

    def run_until_stopped(self, *, drain_seconds: float) -> None:
        """Wait for a signal, and for so long for the requests on their way; a second signal ends
        them. Raises KeyboardInterrupt where it was Ctrl-C.
        """
        while not self._signals:
            time.sleep(_TICK_SECONDS)
        self._ask("drain")
        stop_by = time.monotonic() + drain_seconds
        while len(self._signals) < 2 and time.monotonic() < stop_by and self._ask("active"):
            time.sleep(_TICK_SECONDS)
        if self._signals[-1] == signal.SIGINT:
            raise KeyboardInterrupt

    def _ask(self, method: str) -> Any:
        """Return what the entrance says; None where it is gone, and all that was on its way."""
        try:
            return getattr(self._entrance, method).remote().result(timeout_s=_ASK_SECONDS)
        except (RayServeException, RayError, TimeoutError):
            return None


@contextlib.contextmanager
def deploy(
    open_endpoint: OpenEndpoint, access: Access, *, replicas: int, host: str, port: int
) -> Iterator[Deployed]:
    """Serve an endpoint with so many replicas, on ``host`` and ``port`` (0: a free one).

    Raises InputError where the port is taken, Ray Serve has other work in the cluster, or the
    replicas don't fit, and PlacementError where they don't start.
    """
    listener = listen(host, port)
    listener.socket.close()  # it can be listened to
    with contextlib.ExitStack() as ends:
        try:
            ray.init(include_dashboard=False, logging_level="warning")
        except Exception as error:  # Ray's are of many kinds
            raise PlacementError(f"Ray did not start: {error}") from error
        ends.callback(ray.shutdown)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if serve.status().proxies:
            raise InputError(
                "Ray Serve has other work in this cluster: end it with serve shutdown, or start "
                "another cluster"
            )
        alive = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        cpus = replica_cpus(alive, replicas)
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ends.callback(serve.shutdown)
        serve.start(
            http_options={
                "host": host,
                "port": listener.port,
                "keep_alive_timeout_s": KEEP_ALIVE_SECONDS,
            },
            logging_config=quiet,
        )
        application = make_application(
            open_endpoint, access, replicas=replicas, replica_cpus=cpus, logging_config=quiet
        )
        try:
            entrance = serve.run(application, name=_NAME)
        except RuntimeError as error:
            raise _startup_error(str(error)) from error
        document = entrance.describe.remote().result()
        whole = {"url": listener.url, **document, "replicas": replicas}
        with _collected_signals() as signals:
            yield Deployed(entrance, whole, signals)


@contextlib.contextmanager
def _collected_signals() -> Iterator[list[signal.Signals]]:
    """Collect signals that would end the process."""
    signals: list[signal.Signals] = []

    def take(number: int, frame: FrameType | None) -> None:
        signals.append(signal.Signals(number))

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def replica_cpus(nodes: Sequence[float], replicas: int) -> int:
    """Return the CPUs that each replica gets where they are spread over nodes with so many; raises
    InputError where they don't fit.
    """
    there = [int(cpus) for cpus in nodes if cpus >= 1]
    if replicas > sum(there):
        raise InputError(
            f"--replicas {replicas} take a CPU each, and the cluster has {sum(there)}: give at "
            "most so many"
        )
    return max(1, min(there) // math.ceil(replicas / len(there)))


def _startup_error(said: str) -> Exception:
    """Return the error of a replica that did not start, of which Ray has the text alone."""
    status = serve.status().applications[_NAME]
    for deployment in status.deployments.values():
        if "Error:" in deployment.message:
            said = deployment.message.strip().splitlines()[-1]
            kind, _, text = said.partition(": ")
            if kind.rpartition(".")[2] == InputError.__name__:
                return InputError(text)
    return PlacementError(f"the replicas did not start: {said}")
