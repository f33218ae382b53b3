"""Starts workers: one process each, under a limit, and says how each ended."""

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.units import MIB
from scripts.experiments.offload.cgroups import LimitedRun, run_limited
from scripts.experiments.offload.figures import Fields
from scripts.experiments.offload.peers import System
from scripts.experiments.offload.shapes import Shape
from scripts.experiments.offload.trained import TrainedModel

PROMPT_TOKENS = 32
_ROOT = Path(__file__).resolve().parents[3]
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
"""How the last line of a traceback begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A worker that ended: its result, or the reason why there is none."""

    result: Fields | None
    limited: LimitedRun
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Runs systems with one checkpoint. ``num_tokens`` overrides each system's own number of timed
    tokens, ``budget_bytes`` the budget that ours works out from the limit; ``machine`` is the
    machine.json that ours plans with. On the device "cuda" limits are those of its memory.
    """

    folder: Path
    checkpoint: Path
    shape: Shape | TrainedModel
    threads: int
    reserve_bytes: int
    budget_bytes: int | None
    num_tokens: int | None
    machine: Path | None
    device: str = "cpu"
    timeout_seconds: float = 300.0

    def prepare(self, system: System) -> Attempt:
        """Let a system make its files, without a limit."""
        return self._run(system, None, prepare=True)

    def measure(self, system: System, limit_mib: int | None) -> Attempt:
        """Run a system; its result holds the logits (S, V) of each pass as ``logits_SV``."""
        attempt = self._run(system, limit_mib, prepare=False)
        if attempt.result is not None:
            logits = np.fromfile(self._files / "logits.f32", dtype=np.float32)
            attempt.result["logits_SV"] = logits.reshape(-1, self.shape.vocab_size)
        return attempt

    def measure_quality(self, run_folder: Path) -> Attempt:
        """Measure int8 and int4 on the trained model of a run."""
        request = {
            "checkpoint": str(run_folder / "checkpoint"),
            "folder": str(self._files / "quality"),
            "threads": self.threads,
        }
        return self._start("scripts.experiments.offload.quality", request, limit_bytes=None)

    @property
    def _files(self) -> Path:
        return self.folder / "run"

    def _run(self, system: System, limit_mib: int | None, *, prepare: bool) -> Attempt:
        limit_bytes = None if limit_mib is None else limit_mib * MIB
        random = np.random.default_rng(self.shape.seed)
        request = {
            "device": self.device,
            "family": self.shape.family,
            "system": system.name,
            "prepare": prepare,
            "contention": limit_mib is None,
            "checkpoint": str(self.checkpoint),
            "folder": str(self.folder / f"{self.checkpoint.name}-{system.name}"),
            "limit_bytes": limit_bytes,
            "reserve_bytes": self.reserve_bytes,
            "budget_bytes": self.budget_bytes,
            "machine": None if self.machine is None else str(self.machine),
            "threads": self.threads,
            "num_tokens": self.num_tokens or system.num_tokens,
            "vocab_size": self.shape.vocab_size,
            "prompt": list(self.shape.prompt)
            if isinstance(self.shape, TrainedModel)
            else random.integers(self.shape.vocab_size, size=PROMPT_TOKENS).tolist(),
            "hints": str(_ROOT / self.shape.hints)
            if isinstance(self.shape, TrainedModel)
            else None,
            "probe_folder": str(self._files),  # emptied before each run
            "logits": str(self._files / "logits.f32"),
        }
        host_limit = limit_bytes if self.device == "cpu" else None
        return self._start("scripts.experiments.offload.worker", request, limit_bytes=host_limit)

    def _start(self, module: str, request: dict[str, Any], *, limit_bytes: int | None) -> Attempt:
        shutil.rmtree(self._files, ignore_errors=True)
        self._files.mkdir(parents=True)
        result = self._files / "result.json"
        path = self._files / "request.json"
        path.write_text(json.dumps({**request, "result": str(result)}))
        limited = run_limited(
            [sys.executable, "-m", module, str(path)],
            limit_bytes=limit_bytes,
            log=self._files / "log",
            timeout_seconds=self.timeout_seconds,
            environment=self._environment(),
        )
        if limited.returncode or not result.exists():
            log = (self._files / "log").read_text(errors="replace")
            return Attempt(result=None, limited=limited, reason=self._explain(limited, log))
        return Attempt(result=json.loads(result.read_text()), limited=limited, reason=None)

    def _environment(self) -> dict[str, str]:
        paths = [str(_ROOT), os.environ.get("PYTHONPATH")]
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }

    def _explain(self, limited: LimitedRun, log: str) -> str:
        """Say in a few words why a worker gave no result."""
        lines = log.strip().splitlines() or ["it said nothing"]
        phases = [line.removeprefix("phase: ") for line in lines if line.startswith("phase: ")]
        during = f"while {phases[-1]}" if phases else "at start"
        if limited.timed_out:
            return f"took more than {self.timeout_seconds:.0f} s {during}"
        if limited.out_of_memory and self.device == "cpu":
            return f"killed by the limit {during}"
        errors = [line for line in lines if _EXCEPTION.match(line)]
        last = (errors or lines)[-1]
        if "OutOfMemoryError" in last:  # torch's, on a GPU
            return f"out of GPU memory under the limit {during}"
        return f"error {during}: {last[:160]}"
