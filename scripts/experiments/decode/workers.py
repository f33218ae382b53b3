"""Starts worker processes and talks with them: many hold a model, one computes at a time."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from lib.errors import PlacementError
from lib.kconfig import ROOT
from scripts.experiments.decode.peers import System, Task

_END_SECONDS = 20.0


class WorkerError(PlacementError):
    """A request failed, or the worker ended; the message says why in a line."""


class WorkerProcess:
    """A worker with one system. ``python``: the interpreter; ``log``: a file for what it prints."""

    def __init__(self, system: System, task: Task, *, python: str, log: Path) -> None:
        self.system = system
        self.width = task.width
        self.name = f"{system.name} {task.width}"
        self._task = task
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, "-W", "ignore", "-m", "scripts.experiments.decode.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=worker_environment(task.threads),
                cwd=ROOT,
            )

    def load(self) -> dict[str, Any]:
        """Load the model; returns the bytes of its matrices, and the system's version."""
        loaded: dict[str, Any] = self.call(
            "load", system=self.system.name, task=self._task.to_json()
        )
        return loaded

    def call(self, name: str, **arguments: Any) -> Any:
        """Ask for a call of ``worker.Worker`` and wait; raises WorkerError."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        line = ""
        try:
            print(json.dumps({"call": name, **arguments}), file=requests, flush=True)
            line = answers.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise WorkerError(f"the worker ended during {name}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"exit code {code}; {lines[-1][:200] if lines else 'it said nothing'}"


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment of every worker."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def is_installed(system: System, python: str) -> bool:
    """Say whether an interpreter has the package of a system."""
    code = f"import importlib.metadata as m; m.version({system.package!r})"
    done = subprocess.run([python, "-c", code], check=False, capture_output=True)
    return done.returncode == 0
