"""What exact output is worth on a model: texts that it writes resident, streamed, and exactly.

The same prompts are continued three ways, each twice: what is compiled and learned comes with the
first, the second is timed. All are greedy, and may be compared token by token.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..blocks import storage_bytes
from ..errors import InputError
from ..hints import Hints
from ..progressive.attach import attach
from ..progressive.division import divide
from ..progressive.exact import ExactRuntime
from ..progressive.requests import check_can_draft
from ..tiering import Runtime
from ..tiering.planning.budget import Budget

Fields = dict[str, Any]
_LEAST_TOKENS = 4
"""Of a sequence: half of them are written, and windows need two."""


@dataclass(frozen=True, slots=True)
class DecodingSettings:
    """What texts are written within. ``resident``: one is also written with all weights where they
    are, on the device, which says what the text is.
    """

    budget: Budget | None
    device: torch.device
    resident: bool = True


def check_decoding(
    model: Any, tokens: Tensor, hints: Hints | None, settings: DecodingSettings
) -> None:
    """Raise InputError for what ``measure_decoding`` would refuse."""
    if settings.budget is None:
        raise InputError("exact output divides a budget: give one, such as budget={'HBM': ...}")
    if tokens.shape[1] < _LEAST_TOKENS:
        raise InputError(
            f"sequences of {tokens.shape[1]} tokens have no half to write: give {_LEAST_TOKENS} or "
            "more"
        )
    check_can_draft(model)
    divide(model, hints, budget=settings.budget, device=settings.device)


def measure_decoding(
    model: Any, tokens: Tensor, hints: Hints | None, settings: DecodingSettings
) -> Fields:
    """Let a causal language model that isn't attached continue the first halves of sequences
    (N, T); return the figures of its ways as a document. Raises what attach raises.
    """
    check_decoding(model, tokens, hints, settings)
    budget, device, resident = settings.budget, settings.device, settings.resident
    length = tokens.shape[1] // 2
    prompts, new_tokens = tokens[:, :length].to(device), tokens.shape[1] - length
    whole = _write(model, prompts, new_tokens, None) if resident else None
    with attach(model, hints, budget=budget, device=device) as runtime:
        streamed = _write(model, prompts, new_tokens, runtime)
    with attach(model, hints, budget=budget, device=device, exact=True) as runtime:
        assert isinstance(runtime, ExactRuntime)
        drafted = _write(model, prompts, new_tokens, runtime)
        name = runtime.draft.name
        stats = runtime.stats().drafting
    texts_NT = drafted.pop("texts")
    wanted_NT = (streamed if whole is None else whole)["texts"]
    for part in (streamed, *([] if whole is None else [whole])):
        part.pop("texts")
    return {
        "sequences": len(prompts),
        "prompt_tokens": prompts.shape[1],
        "new_tokens": new_tokens,
        "resident": whole,
        "streamed": streamed,
        "exact": {
            **drafted,
            "precision": name,
            "windows": stats.windows,
            "mean_window": stats.drafted / max(stats.windows * len(prompts), 1),
            "acceptance": stats.acceptance,
        },
        "equal_tokens": int((texts_NT == wanted_NT).int().cumprod(-1).sum()),
        "tokens": texts_NT.numel(),
    }


def _write(model: Any, prompts: Tensor, new_tokens: int, runtime: Runtime | None) -> Fields:
    """Write the texts, and again; returns them (N, T) and what the second time came to."""
    texts_NT = prompts
    seconds = 0.0
    for _ in range(2):
        if runtime is not None:
            runtime.reset_stats()
        begin = time.perf_counter()
        texts_NT = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        seconds = time.perf_counter() - begin
    figures: Fields = {
        "texts": texts_NT[:, prompts.shape[1] :].cpu(),
        "tokens_per_s": len(prompts) * new_tokens / seconds,
        "bytes_moved_per_token": 0,
        "peak_weight_bytes": storage_bytes(model.parameters()),
    }
    if runtime is not None:
        stats = runtime.stats()
        figures["bytes_moved_per_token"] = round(stats.bytes_moved / (len(prompts) * new_tokens))
        figures["peak_weight_bytes"] = stats.peak_resident_bytes
    return figures
