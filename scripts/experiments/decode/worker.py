"""A worker: one system with one model, in a process that computes when it is asked to.

    python -m scripts.experiments.decode.worker

Requests come as a line of JSON each on stdin, answers go as one on what was stdout: ``{"result":
...}``, or ``{"error": ...}`` for a request that failed. Whatever libraries print goes to stderr.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, TextIO

import numpy as np

from scripts.experiments.decode.peers import SYSTEMS, Session, Task


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    worker = Worker()
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        try:
            answer = {"result": getattr(worker, request.pop("call"))(**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """The calls that may be asked for."""

    def __init__(self) -> None:
        self._session: Session | None = None

    def load(self, system: str, task: dict[str, Any]) -> dict[str, Any]:
        """Load a model; returns the bytes of its matrices, and the system's version."""
        self._session = SYSTEMS[system].load(Task.from_json(task))
        return {**asdict(self._session.sizes), "version": version(SYSTEMS[system].package)}

    def prepare(self, mode: str, ids: list[list[int]], steps: int) -> None:
        """See Session.prepare."""
        self.session.prepare(mode, np.array(ids, np.int64), steps)

    def decode(self, mode: str, steps: int) -> list[float]:
        """See Session.decode."""
        return self.session.decode(mode, steps)

    def prefill(self, ids: list[int]) -> float:
        """See Session.prefill."""
        return self.session.prefill(np.array(ids, np.int64))

    def logits(self, ids: list[int], path: str) -> None:
        """Write the logits (T, V) of a sequence to a file, as fp32."""
        self.session.logits(np.array(ids, np.int64)).tofile(path)

    @property
    def session(self) -> Session:
        assert self._session is not None, "load first"
        return self._session


if __name__ == "__main__":
    main()
