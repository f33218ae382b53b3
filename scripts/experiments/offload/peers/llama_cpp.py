"""llama.cpp by llama-cpp-python, which maps its file: what doesn't fit is read again by the kernel.

Its own formats: fp32, and what its quantizer makes of that. The map is page cache of the group that
the limit is for. What reads it is the kernel, so ``disk reads`` count what moved.
"""

from typing import Any

from lib.errors import InputError
from scripts.experiments.offload.peers.base import Loaded, System, Task, register_system

_SOURCE = "model-F32.gguf"


class LlamaCpp(System):
    """One of its types of file."""

    width: str
    devices = ("cpu",)
    module = "llama_cpp"
    install = "pip install llama-cpp-python (it builds for a quarter of an hour)"
    needs_preparing = True

    def prepare(self, task: Task) -> None:
        """Write the checkpoint as GGUF, and let llama.cpp quantize that."""
        from scripts.experiments.decode.gguf_file import write_gguf
        from scripts.experiments.decode.peers.llama_cpp import quantize

        task.folder.mkdir(parents=True, exist_ok=True)
        source, target = task.folder / _SOURCE, task.folder / f"model-{self.width}.gguf"
        if target.exists():
            return
        write_gguf(task.checkpoint, source)
        if source != target:
            quantize(source, target, self.width, threads=1)
            source.unlink()

    def load(self, task: Task) -> Loaded:
        """Map the file; its logits are for every token that is fed."""
        import torch

        path = task.folder / f"model-{self.width}.gguf"
        return Loaded(model=_MappedModel(str(path), threads=torch.get_num_threads()))


@register_system
class LlamaCppF32(LlamaCpp):
    name, label, width = "llama.cpp", "llama.cpp, fp32", "F32"


@register_system
class LlamaCppQ8(LlamaCpp):
    name, label, width = "llama.cpp-q8", "llama.cpp, Q8_0", "Q8_0"
    full_precision = False


@register_system
class LlamaCppQ4(LlamaCpp):
    name, label, width = "llama.cpp-q4", "llama.cpp, Q4_0", "Q4_0"
    full_precision = False


class _MappedModel:
    """What the benchmark asks of a model: greedy ``generate`` with logits processors."""

    def __init__(self, path: str, *, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._threads = threads
        settings = self._api.llama_model_default_params()
        self._model = self._api.llama_model_load_from_file(path.encode(), settings)
        if not self._model:
            raise InputError(f"llama.cpp can't load {path}: its log says why")

    def generate(
        self,
        ids_1T: Any,
        *,
        attention_mask: Any,
        generation_config: Any,
        logits_processor: Any = (),
    ) -> Any:
        """Return the ids with so many new ones as the settings say."""
        import numpy as np
        import torch

        from scripts.experiments.decode.peers.llama_cpp import Context

        assert bool(attention_mask.all()) and not generation_config.do_sample
        api, model, ids = self._api, self._model, ids_1T[0].tolist()
        params = api.llama_context_default_params()
        params.n_ctx = -(-(len(ids) + generation_config.max_new_tokens) // 256) * 256
        params.n_batch = params.n_ubatch = max(512, len(ids))
        params.n_threads = params.n_threads_batch = self._threads
        num_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        context = Context(api, model, params, num_vocab)
        fed = np.array(ids)
        for _ in range(generation_config.max_new_tokens):
            start = len(ids) - len(fed)
            logits_1V = context.feed(fed, np.zeros_like(fed), start, outputs=1)
            scores_1V = torch.from_numpy(logits_1V.copy())
            for processor in logits_processor:
                scores_1V = processor(torch.tensor([ids]), scores_1V)
            ids.append(int(scores_1V.argmax()))
            fed = np.array(ids[-1:])
        context.close()
        return torch.tensor([ids])
