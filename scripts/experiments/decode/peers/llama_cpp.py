"""llama.cpp by llama-cpp-python: files of its own quantizer, computed through its C interface.

The quantizer reads ``model-f32.gguf`` (``gguf_file``) in the task's folder; what it makes stays
there. K-quants need rows of multiples of 256, and it takes larger types where they aren't.
"""

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.errors import InputError
from scripts.experiments.decode.peers.base import (
    NATIVE,
    WARM_UP_STEPS,
    Session,
    Sizes,
    System,
    Task,
    register_system,
)

SOURCE = "model-f32.gguf"


@register_system
class LlamaCpp(System):
    name = "llama.cpp"
    widths = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
    modes = (NATIVE,)
    package = "llama-cpp-python"
    install = "pip install llama-cpp-python (it builds for a quarter of an hour), or --llama-python"
    on_torch = False

    def load(self, task: Task) -> Session:
        import llama_cpp

        llama_cpp.llama_backend_init()
        path = task.folder / f"model-{task.width}-{llama_cpp.__version__}.gguf"
        if not path.exists():
            quantize(task.folder / SOURCE, path, task.width, threads=task.threads)
        return LlamaSession(path, read_shapes(task.checkpoint), threads=task.threads)


def quantize(source: Path, target: Path, width: str, *, threads: int) -> None:
    """Let llama.cpp's quantizer write a file of one of its types."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{width}")
    params.nthread = threads
    partial = target.with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(partial).encode(), ctypes.byref(params)
    )
    if code:
        raise InputError(f"llama.cpp can't quantize {source} to {width} (code {code})")
    partial.rename(target)


def read_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Return the weights' shapes by name, from the headers of safetensors files."""
    shapes = {}
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        shapes.update({name: entry["shape"] for name, entry in header.items()})
    return shapes


class LlamaSession(Session):
    """A GGUF file in llama.cpp. Vectors and learned positions are fp32 in it."""

    def __init__(self, path: Path, shapes: dict[str, list[int]], *, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise InputError(f"llama.cpp can't load {path}: its log says why")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._prepared: Context | None = None
        held = llama_cpp.llama_model_size(self._model)
        held -= 4 * sum(shape[0] for shape in shapes.values() if len(shape) == 1)
        positions = sum(
            shape[0] * shape[1] for name, shape in shapes.items() if name.endswith("wpe.weight")
        )
        self.sizes = Sizes(held_bytes=held, read_bytes=held - 4 * positions)

    def prepare(self, mode: str, ids_BT: NDArray[np.int64], steps: int) -> None:
        self._close_prepared()
        self._prepared = context = self._context(ids_BT.shape[0], ids_BT.shape[1] + steps)
        context.start(ids_BT)
        context.decode(WARM_UP_STEPS)

    def decode(self, mode: str, steps: int) -> list[float]:
        assert self._prepared is not None, "prepare first"
        return self._prepared.decode(steps)[WARM_UP_STEPS:]

    def prefill(self, ids_T: NDArray[np.int64]) -> float:
        context = self._context(1, len(ids_T))
        begin = time.perf_counter()
        context.feed(ids_T, np.zeros_like(ids_T), 0, outputs=1)
        seconds = time.perf_counter() - begin
        context.close()
        return seconds

    def logits(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        context = self._context(1, len(ids_T))
        logits_TV = context.feed(ids_T, np.zeros_like(ids_T), 0, outputs=len(ids_T)).copy()
        context.close()
        return logits_TV

    def _context(self, num_sequences: int, length: int) -> "Context":
        params = self._api.llama_context_default_params()
        params.n_ctx = num_sequences * (-(-length // 256) * 256)
        params.n_batch = params.n_ubatch = max(512, num_sequences)
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = self._threads
        return Context(self._api, self._model, params, self._num_vocab)

    def _close_prepared(self) -> None:
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None


class Context:
    """A llama_context: sequences side by side, each a token further at every step."""

    def __init__(self, api: Any, model: Any, params: Any, num_vocab: int) -> None:
        self._api = api
        self._num_vocab = num_vocab
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise InputError("llama.cpp can't make a context: its log says why")
        self._size = params.n_batch
        self._batch = api.llama_batch_init(self._size, 0, 1)
        self._num_context = 0
        self._first_B = np.zeros(0, np.int64)

    def close(self) -> None:
        """Free the context; it may not be used afterwards."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)

    def start(self, ids_BT: NDArray[np.int64]) -> None:
        """Compute each sequence's context."""
        self._num_context = ids_BT.shape[1]
        self._first_B = np.array(
            [
                self.feed(ids_T, np.full_like(ids_T, row), 0, outputs=1)[-1].argmax()
                for row, ids_T in enumerate(ids_BT)
            ]
        )

    def decode(self, steps: int) -> list[float]:
        """Take greedy steps from the contexts on; return the seconds of each."""
        memory = self._api.llama_get_memory(self._context)
        rows = np.arange(len(self._first_B))
        for row in rows:
            self._api.llama_memory_seq_rm(memory, int(row), self._num_context, -1)
        ids_B, seconds = self._first_B, []
        for step in range(steps):
            begin = time.perf_counter()
            logits_BV = self.feed(ids_B, rows, self._num_context + step, outputs=len(rows))
            ids_B = logits_BV.argmax(-1)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def feed(
        self, ids: NDArray[np.int64], sequences: NDArray[np.int64], start: int, *, outputs: int
    ) -> NDArray[np.float32]:
        """Compute tokens: of one sequence, from position ``start`` on, or each the ``start``-th of
        its own. Return the logits (outputs, V) of the last ones, in llama.cpp's memory.
        """
        batch, count = self._batch, len(ids)
        assert count <= self._size, f"{count} tokens at a time, of {self._size}"
        together = len(set(sequences.tolist())) == 1
        batch.n_tokens = count
        for index, (token, sequence) in enumerate(
            zip(ids.tolist(), sequences.tolist(), strict=True)
        ):
            batch.token[index] = token
            batch.pos[index] = start + index if together else start
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = index >= count - outputs
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(outputs, self._num_vocab))
