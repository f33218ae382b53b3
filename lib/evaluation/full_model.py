"""What a model says of some text before it is changed, kept to compare with afterwards."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..blocks.faults import find_fault
from ..errors import InputError
from ..precision.quality import Quality, QualityMeter
from ..progress import show_progress
from ..signals.summary import causal_logits, check_token_ids
from ..text.parts import vocabulary_size
from .predictions import measuring_batches


class FullModel:
    """A causal language model's logits of sequences, in files: all of them need not fit in memory.

    Made before the model is attached. The files lie in the temporary folder, a number of the
    model's dtype for each word of the vocabulary and each token, and go with this object.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, *, batch_size: int | None = None) -> None:
        """Run the model, which is in evaluation mode, on ``tokens``: integer ids (N, T) without
        padding.

        ``batch_size``: sequences per forward pass (default: as many as give 128 MiB of float32
        logits). Raises InputError for tokens that aren't the model's and for a model without
        weights, FloatingPointError where logits aren't finite.
        """
        check_token_ids(tokens, model)
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size {batch_size} must be at least 1")
        self.num_sequences = len(tokens)
        self._model = model
        self._device = _device_of(model)
        self._batches = (
            measuring_batches(tokens, vocabulary_size(model))
            if batch_size is None
            else torch.split(tokens, batch_size)
        )
        self._folder = Path(tempfile.mkdtemp(prefix="tierhints-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        with torch.inference_mode():
            for path, ids_BT in self._show("full model"):
                logits_BTV = causal_logits(model, ids_BT.to(self._device)).cpu().contiguous()
                if not bool(logits_BTV.isfinite().all()):
                    fault = find_fault(model) or "they overflow in this dtype"
                    raise FloatingPointError(f"the full model's logits aren't finite: {fault}")
                save_file({"logits": logits_BTV}, path)

    def compare(self, device: torch.device | str | None = None) -> Quality:
        """Run the model as it is now on the same tokens, and return what has changed.

        ``device``: where it computes now (default: where its weights were).
        """
        meter = QualityMeter()
        for ids_BT, reference_BTV, logits_BTV in self.side_by_side(device):
            meter.add(ids_BT, reference_BTV, logits_BTV)
        return meter.result()

    @torch.inference_mode()
    def side_by_side(
        self, device: torch.device | str | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run the model as it is now, and yield tokens (B, T) with the full model's logits and
        those of now, (B, T, V).
        """
        used = self._device if device is None else torch.device(device)
        for path, ids_BT in self._show("as placed"):
            ids_BT = ids_BT.to(used)
            reference_BTV = load_file(path)["logits"].to(used)
            yield ids_BT, reference_BTV, causal_logits(self._model, ids_BT)

    def _show(self, name: str) -> Iterator[tuple[Path, Tensor]]:
        count = len(self._batches)
        paths = (self._folder / f"{index}.safetensors" for index in range(count))
        return show_progress(zip(paths, self._batches, strict=True), name, total=count)


def _device_of(model: nn.Module) -> torch.device:
    device = next(model.parameters()).device
    if device.type == "meta":
        raise InputError(
            "the model has no weights yet, so what it says in full can't be known: load it with "
            "from_pretrained"
        )
    return device
