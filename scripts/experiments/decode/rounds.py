"""One model of the benchmark in all systems: workers are started, take turns, and are judged."""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from lib.precision.quality import QualityMeter, Reference
from lib.progress import progress_bar
from lib.text.held_out import load_heldout, sequence_length
from lib.text.parts import cut_parts
from scripts.experiments.decode.figures import (
    PREFILL,
    Cell,
    Fields,
    Judged,
    find_ratios,
    make_row,
)
from scripts.experiments.decode.gguf_file import write_gguf
from scripts.experiments.decode.models import BenchModel
from scripts.experiments.decode.peers import Sizes, System, Task
from scripts.experiments.decode.peers.base import COMPILED, EAGER, NATIVE, WARM_UP_STEPS
from scripts.experiments.decode.peers.llama_cpp import SOURCE
from scripts.experiments.decode.workers import WorkerError, WorkerProcess, is_installed

DECODED_CONTEXT = 64
"""Tokens before those that are decoded: the cache of keys and values stays small."""
PREFILL_TOKENS = 512
_PREFILLS = 3
"""Timed prompts of each system."""


@dataclass(kw_only=True)
class Measured:
    """What was measured of a model; ``sizes`` and ``judged`` by system and width."""

    model: BenchModel
    cells: list[Cell] = field(default_factory=list)
    sizes: dict[tuple[str, str], Sizes] = field(default_factory=dict)
    judged: dict[tuple[str, str], Judged] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    text: Fields | None = None

    def to_json(self, bandwidth_gb_s: float) -> Fields:
        """Return the model's part of the document."""
        num_weights = self.model.num_weights
        rows = [
            make_row(
                cell,
                self.sizes[cell.system, cell.width],
                self.judged.get((cell.system, cell.width)),
                num_weights=num_weights,
                bandwidth_gb_s=bandwidth_gb_s,
            )
            for cell in self.cells
            if cell.seconds
        ]
        ratios, nearest = find_ratios(rows, COMPILED)
        return {
            "rows": rows,
            "ratios": ratios,
            "ratios_eager": find_ratios(rows, EAGER)[0],
            "nearest_of_llama_cpp": nearest,
            "num_weights": num_weights,
            "text": self.text,
            "versions": self.versions,
            "absent": self.absent,
            "failed": self.failed,
        }


def measure_model(
    model: BenchModel,
    systems: Iterable[tuple[System, str]],
    args: argparse.Namespace,
    *,
    seconds: float,
) -> Measured:
    """Measure a model in all systems; those that can't be run are named with the reason, and so is
    what would be prepared ``seconds`` from now or later.
    """
    rounds = Rounds(model, args, end=time.monotonic() + seconds)
    with ExitStack() as stack:
        rounds.start(systems, stack)
        if model.trained:
            rounds.judge()
        rounds.prefill()
        for batch in args.batches:
            rounds.decode(batch)
    return rounds.measured


class Rounds:
    """The workers of one model, and what they have measured. ``end``: by time.monotonic()."""

    def __init__(self, model: BenchModel, args: argparse.Namespace, *, end: float) -> None:
        self.measured = Measured(model=model)
        self._model = model
        self._args = args
        self._end = end
        self._workers: list[WorkerProcess] = []

    def start(self, systems: Iterable[tuple[System, str]], stack: ExitStack) -> None:
        """Start the workers and let each load its model, one after another."""
        model, args, measured = self._model, self._args, self.measured
        logs = args.work_dir / "logs"
        logs.mkdir(exist_ok=True)
        for system, width in systems:
            name = f"{system.name} {width}"
            python = sys.executable if system.on_torch else args.llama_python or sys.executable
            if system.name in measured.absent:
                continue
            if not is_installed(system, python):
                measured.absent[system.name] = f"not installed: {system.install}"
                continue
            if system.needs_hints(width) and model.hints is None:
                measured.absent[name] = "no hints of this model"
                continue
            if not system.on_torch:
                write_gguf(model.checkpoint, model.folder / SOURCE)
            task = Task(
                checkpoint=model.checkpoint,
                folder=model.folder,
                width=width,
                threads=args.threads,
                hints=model.hints,
            )
            log = logs / f"{model.name} {name}.log".replace(" ", "-")
            _say(f"{model.name}: {name}: loading")
            worker = WorkerProcess(system, task, python=python, log=log)
            stack.callback(worker.close)
            try:
                loaded = worker.load()
            except WorkerError as error:
                worker.close()
                if not self._workers:  # the plain model: nothing can be said without it
                    raise
                measured.failed[name] = str(error)
                continue
            measured.versions[system.name] = loaded.pop("version")
            measured.sizes[system.name, width] = Sizes(**loaded)
            self._workers.append(worker)

    def decode(self, batch: int) -> None:
        """Let all prepare a batch, then take turns, at least one each."""
        args = self._args
        ids_BT = self._random_ids(batch, DECODED_CONTEXT)
        steps = args.steps + WARM_UP_STEPS
        turns: list[tuple[WorkerProcess, Cell]] = []
        for worker in self._workers:
            for mode in worker.system.modes:
                if mode != NATIVE and mode not in args.modes:
                    continue
                name = f"{worker.name}, {mode}, batch {batch}"
                if self._is_over:
                    self.measured.absent[name] = "not begun within --minutes"
                    continue
                _say(f"{self._model.name}: {name}: preparing")
                with self._noting(name):
                    worker.call("prepare", mode=mode, ids=ids_BT.tolist(), steps=steps)
                    turns.append((worker, _cell(worker, mode, batch, tokens=batch)))
        with progress_bar(args.rounds * len(turns), f"{self._model.name}, batch {batch}") as bar:
            for number in range(args.rounds):
                if number and self._is_over:
                    break
                for worker, cell in turns:
                    with self._noting(f"{worker.name}, {cell.mode}, batch {batch}"):
                        cell.seconds.extend(worker.call("decode", mode=cell.mode, steps=steps))
                    bar.update(1)
        self.measured.cells += [cell for _, cell in turns]

    @property
    def _is_over(self) -> bool:
        return time.monotonic() > self._end

    def prefill(self) -> None:
        """Time prompts in turns."""
        ids_T = self._random_ids(1, PREFILL_TOKENS)[0].tolist()
        turns = [
            (worker, _cell(worker, PREFILL, 1, tokens=PREFILL_TOKENS)) for worker in self._workers
        ]
        with progress_bar((_PREFILLS + 1) * len(turns), f"{self._model.name}, prefill") as bar:
            for number in range(_PREFILLS + 1):
                for worker, cell in turns:
                    with self._noting(f"{worker.name}, {PREFILL}"):
                        seconds = worker.call("prefill", ids=ids_T)
                        if number:  # the first one warms up
                            cell.seconds.append(seconds)
                    bar.update(1)
        self.measured.cells += [cell for _, cell in turns]

    def judge(self) -> None:
        """Compare everybody's logits with the plain model's, on text that hints were not made or
        calibrated on: of the held-out text the third that calibration leaves to judge on.
        """
        tokens, source = self._read_text()
        self.measured.text = {"source": source, "tokens": tokens.numel()}
        plain, *others = self._workers
        meters = {worker: QualityMeter() for worker in self._workers}
        with (
            tempfile.TemporaryDirectory() as folder,
            progress_bar(len(tokens) * len(meters), f"{self._model.name}, text") as bar,
        ):
            path = Path(folder) / "logits"

            def read_logits(worker: WorkerProcess, ids_T: list[int]) -> Tensor:
                worker.call("logits", ids=ids_T, path=str(path))
                logits = torch.from_numpy(np.fromfile(path, np.float32))
                bar.update(1)
                return logits.view(1, len(ids_T), -1)

            for ids_T in tokens:
                ids = ids_T.tolist()
                logits_1TV = read_logits(plain, ids)
                reference = Reference(ids_T[None], logits_1TV)
                meters[plain].compare(reference, logits_1TV)
                for worker in others:
                    with self._noting(f"{worker.name}, text"):
                        meters[worker].compare(reference, read_logits(worker, ids))
        for worker, meter in meters.items():
            if f"{worker.name}, text" not in self.measured.failed:
                quality = meter.result()
                self.measured.judged[worker.system.name, worker.width] = Judged(
                    kl_nats=quality.kl_nats, perplexity=quality.perplexity
                )

    def _read_text(self) -> tuple[Tensor, str]:
        name = str(self._model.checkpoint)
        length = sequence_length(AutoConfig.from_pretrained(name), None)
        text = load_heldout(name, vocab_size=self._model.vocab_size, length=length)
        return cut_parts(text, seed=None).judging[: self._args.sequences], text.source

    def _random_ids(self, batch: int, length: int) -> NDArray[np.int64]:
        return np.random.default_rng(0).integers(self._model.vocab_size, size=(batch, length))

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Let a request fail: the reason stands in the document, and the others go on."""
        try:
            yield
        except WorkerError as error:
            self.measured.failed[name] = str(error)


def _cell(worker: WorkerProcess, mode: str, batch: int, *, tokens: int) -> Cell:
    return Cell(
        system=worker.system.name, width=worker.width, mode=mode, batch=batch, tokens=tokens
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
