"""Time forward passes, and measure the process's memory while they run.

Times are of a wall clock, the device synchronized around each pass, plus the emulated seconds where
a virtual clock runs. The process's memory is the kernel's own high-water mark, reset before a run.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..precision.quality import Quality, QualityMeter, next_token_nll, perplexity
from ..progress import show_progress
from ..tiering.residency.fast_memory import trim_heap

PERPLEXITY_TOKENS = 8192
"""Held-out tokens read for a perplexity, at most: seconds on two cores, and a standard error of
about 2 %."""
KL_TOKENS = 4096
"""Held-out tokens whose logits are kept on disk for the KL, at most: KL varies little over text."""


class ForwardBench:
    """One model and its held-out text, forwarded batch by batch.

    Timed passes go round and round the text in batches of ``batch_size`` sequences; a perplexity
    reads each sequence once.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        *,
        batch_size: int,
        warmup: int,
        device: torch.device,
    ) -> None:
        """Move the text to the device, so that no copy of it is timed.

        ``tokens`` is (sequences, length) on the CPU. ``warmup`` passes go before the timed ones.
        """
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self.warmup = warmup
        self.length = tokens.shape[1]
        num_sequences = max(1, min(len(tokens), PERPLEXITY_TOKENS // self.length))
        num_batches = math.ceil(num_sequences / batch_size)
        rows = torch.arange(num_batches * batch_size) % num_sequences
        self._batches = list(torch.split(tokens[rows].to(device), batch_size))
        self._heldout = list(torch.split(tokens[:num_sequences].to(device), batch_size))
        self.perplexity_tokens = num_sequences * (self.length - 1)

    def run(
        self,
        name: str,
        *,
        iterations: int,
        virtual_seconds: Callable[[], float] = lambda: 0.0,
        on_warm: Callable[[], None] = lambda: None,
        after_pass: Callable[[int], None] = lambda num_passes: None,
    ) -> tuple[list[float], dict[str, Any]]:
        """Return seconds per timed pass, and the peak memory while they ran.

        ``virtual_seconds`` reads an emulated clock; what it advances during a pass is added to the
        pass. ``on_warm`` is called between warm-up and timing, ``after_pass`` with the number of
        timed passes after each, outside its time.
        """
        self.release_memory()
        for index in show_progress(range(self.warmup), f"{name}: warm-up", total=self.warmup):
            self._forward(self._batches[index % len(self._batches)])
        on_warm()
        can_reset = reset_peak_rss()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = []
        for index in show_progress(range(iterations), f"{name}: timing", total=iterations):
            batch = self._batches[index % len(self._batches)]
            virtual_start = virtual_seconds()
            start = time.perf_counter()
            self._forward(batch)
            elapsed = time.perf_counter() - start
            seconds.append(elapsed + virtual_seconds() - virtual_start)
            after_pass(len(seconds))
        memory: dict[str, Any] = {"peak_rss_bytes": peak_rss() if can_reset else None}
        if self.device.type == "cuda":
            memory["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return seconds, memory

    def perplexity(self, name: str) -> float:
        """Return exp of the mean next-token loss over the held-out sequences.

        Raises FloatingPointError if it is not finite.
        """
        total = 0.0
        label, count = f"{name}: perplexity", len(self._heldout)
        for batch in show_progress(self._heldout, label, total=count):
            logits_BTV = self._forward(batch)
            total += sum(map(next_token_nll, logits_BTV, batch))
        return perplexity(total / self.perplexity_tokens)

    def save_reference(self, folder: Path) -> None:
        """Write the logits of the first held-out tokens to files, for ``compare_reference``."""
        for index, batch in enumerate(self._kl_batches()):
            logits_BTV = self._forward(batch).cpu().contiguous()
            save_file({"logits": logits_BTV}, folder / f"reference_{index}.safetensors")

    def compare_reference(self, folder: Path) -> Quality:
        """Compare the model as it is now with the one whose logits were saved."""
        meter = QualityMeter()
        batches = self._kl_batches()
        for index, batch in enumerate(show_progress(batches, "KL", total=len(batches))):
            reference = load_file(folder / f"reference_{index}.safetensors")["logits"]
            meter.add(batch.cpu(), reference, self._forward(batch).cpu())
        return meter.result()

    def save_logits(self, path: Path) -> None:
        """Write the first batch's logits to a file: in memory they would count in the next run."""
        save_file({"logits": self._forward(self._batches[0]).cpu().contiguous()}, path)

    def compare_logits(self, path: Path) -> dict[str, Any]:
        """Compare the first batch's logits with saved ones, by bits and by size."""
        expected = load_file(path)["logits"]
        logits = self._forward(self._batches[0]).cpu().contiguous()
        same = torch.equal(logits.view(torch.uint8), expected.view(torch.uint8))
        return {
            "logits_bit_identical": same,
            "max_abs_logit_difference": (logits.float() - expected.float()).abs().max().item(),
            "logits_compared": logits.numel(),
        }

    def _kl_batches(self) -> Sequence[Tensor]:
        return self._heldout[: max(1, KL_TOKENS // (self.batch_size * self.length))]

    def release_memory(self) -> None:
        """Give back what an earlier run left over, so that it doesn't count in the next peak."""
        gc.collect()
        trim_heap()

    def tokens_per_second(self, seconds: Sequence[float]) -> float:
        """Return the tokens of all passes over the time of all passes."""
        return len(seconds) * self.batch_size * self.length / sum(seconds)

    @torch.inference_mode()
    def _forward(self, batch_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(input_ids=batch_BT, use_cache=False).logits
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return logits_BTV


def latency_to_json(seconds: Sequence[float]) -> dict[str, float | int]:
    """Return mean, median, 95th percentile (linear between ranks) in milliseconds, and n."""
    milliseconds = np.asarray(seconds) * 1e3
    return {
        "mean": float(milliseconds.mean()),
        "median": float(np.median(milliseconds)),
        "p95": float(np.percentile(milliseconds, 95)),
        "n": len(seconds),
    }


def reset_peak_rss() -> bool:
    """Set the high-water mark of resident memory to the present; False where that can't be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Return the high-water mark of this process's resident memory in bytes (VmHWM of Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")


def fast_memory_note(mode: str, *, allocator: bool) -> str:
    """Say what the peak of fast memory counts."""
    if allocator:
        return "CUDA allocator's peak: weights and activations"
    return (
        "weight storages resident"
        if mode == "real"
        else "weight storages resident: emulation moves nothing"
    )
