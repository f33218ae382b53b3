"""The frontier of a model: fast memory against decoding speed against KL, over budgets and ways to
hold its weights.

Every point is a run of its own: the model is attached, decodes, is compared with the full model on
the same text, and is detached. Memory is the peak of weight bytes in fast memory that the runtime
counted; speed is the median of single decoding steps of one sequence, after the prompt.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import storage_bytes
from ..errors import InputError
from ..hints import Hints
from ..precision.quality import Quality
from ..progress import show_progress
from ..tiering import attach
from ..vocabulary import Precision, Tier
from .forwards import ForwardBench

UNIFORM = (Precision.INT8, Precision.INT6, Precision.INT5, Precision.INT4, Precision.INT3)
EPSILONS = (0.005, 0.02, 0.1)
STREAMED: tuple[tuple[Precision | None, float | None], ...] = (
    (None, None),
    (Precision.INT8, None),
    (Precision.INT4, None),
    (None, 0.005),
    (None, 0.02),
)
"""Precision and epsilon of what is held under budgets."""
SHARES = (0.5, 0.2)
"""Of the full model's weight bytes: the budgets under which weights are streamed."""
_PROMPT_TOKENS = 16
_DECODED_TOKENS = 24
_UNTIMED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to hold a model: under ``budget_bytes`` of fast memory (None: no limit), lossless, at
    one precision, or in the fewest bytes within ``epsilon`` (nats per token).
    """

    budget_bytes: int | None = None
    precision: Precision | None = None
    epsilon: float | None = None

    @property
    def holding(self) -> str:
        """Say how weights are held: "lossless", "int4", "epsilon 0.02"."""
        if self.epsilon is not None:
            return f"epsilon {self.epsilon:g}"
        return "lossless" if self.precision is None else str(self.precision)

    def to_json(self) -> dict[str, Any]:
        """Return the setting as a document, with ``holding``."""
        precision = None if self.precision is None else str(self.precision)
        return {"holding": self.holding, **asdict(self), "precision": precision}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a setting takes and gives. ``kl_interval``: 95 %, over sequences."""

    setting: Setting
    fast_bytes: int
    """Peak of weight bytes in fast memory, measured."""
    bytes_per_token: int
    """Weight bytes that decoding a token streamed into fast memory; 0: all reside there."""
    tokens_per_s: float
    kl_nats: float
    kl_interval: tuple[float, float] | None
    perplexity: float
    bound_nats: float | None
    """The upper bound that the veto held the plan to; None without an epsilon."""

    def to_json(self) -> dict[str, Any]:
        """Return the point as a flat document."""
        fields = asdict(self)
        del fields["setting"]
        return {**self.setting.to_json(), **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """The full model, what was measured, and the settings that were refused with the reason."""

    full: Point
    points: Sequence[Point]
    refused: Mapping[Setting, str]
    tokens: int
    """Held-out tokens that KL was measured on."""

    def to_json(self) -> dict[str, Any]:
        """Return the document that ``lib.report.frontier`` draws."""
        return {
            "full": self.full.to_json(),
            "points": [point.to_json() for point in self.points],
            "refused": [
                {**setting.to_json(), "reason": reason} for setting, reason in self.refused.items()
            ],
        }


def default_settings(
    full_bytes: int, *, calibrated: bool, budgets: Sequence[int] | None = None
) -> list[Setting]:
    """Return the settings that show a model's frontier: resident at every width, then streamed
    under each budget, by default half and a fifth of the full model's bytes.
    """
    epsilons = EPSILONS if calibrated else ()
    if budgets is None:
        budgets = [int(share * full_bytes) for share in SHARES]
    return [
        *(Setting(precision=precision) for precision in UNIFORM),
        *(Setting(epsilon=epsilon) for epsilon in epsilons),
        *(
            Setting(budget_bytes=budget, precision=precision, epsilon=epsilon)
            for budget in budgets
            for precision, epsilon in STREAMED
            if epsilon is None or calibrated
        ),
    ]


def measure_frontier(
    model: nn.Module,
    tokens: Tensor,
    hints: Hints | None,
    *,
    settings: Sequence[Setting],
    device: torch.device,
) -> Frontier:
    """Measure a model as it is and in every setting, on held-out ``tokens`` (sequences, length).

    ``hints`` serve the settings with an epsilon, and must be calibrated for those. A setting that
    attach() refuses, for a budget that is too small or an epsilon below what kernels cost, is
    reported and left out. The model is as it was afterwards.
    """
    model.to(device)
    bench = ForwardBench(model, tokens, batch_size=4, warmup=0, device=device)
    length = tokens.shape[1]  # within the model's context
    prompt_BT = tokens[:1, : min(_PROMPT_TOKENS, length // 2)].to(device)
    num_tokens = min(_DECODED_TOKENS, length - prompt_BT.shape[1] - _UNTIMED)
    points: list[Point] = []
    refused: dict[Setting, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench.save_reference(Path(folder))
        quality = bench.compare_reference(Path(folder))
        full = _point(
            Setting(),
            storage_bytes(model.parameters()),
            0,
            decoding_rate(model, prompt_BT, num_tokens),
            quality,
            bound_nats=None,
        )
        for setting in show_progress(settings, "frontier", total=len(settings)):
            try:
                with _attached(model, hints, setting, device) as runtime:
                    rate = decoding_rate(model, prompt_BT, num_tokens)
                    moved_bytes = runtime.stats().bytes_moved
                    quality = bench.compare_reference(Path(folder))
                    veto = runtime.veto.to_json()
                    points.append(
                        _point(
                            setting,
                            runtime.stats().peak_resident_bytes,
                            moved_bytes // (num_tokens + _UNTIMED),
                            rate,
                            quality,
                            bound_nats=veto["bound_nats"] if setting.epsilon else None,
                        )
                    )
            except InputError as error:
                refused[setting] = " ".join(str(error).split())
    return Frontier(full=full, points=points, refused=refused, tokens=quality.tokens)


@torch.inference_mode()
def decoding_rate(model: Any, prompt_BT: Tensor, num_tokens: int) -> float:
    """Return tokens per second of greedy decoding with a cache: the median step after the prompt.

    ``prompt_BT`` is (1, T), on the model's device. The first steps are left out.
    """
    ids, cache, seconds = prompt_BT, None, []
    for _ in range(num_tokens + _UNTIMED):
        begin = time.perf_counter()
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        ids.cpu()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 1 / statistics.median(seconds[_UNTIMED:])


@contextmanager
def _attached(
    model: nn.Module, hints: Hints | None, setting: Setting, device: torch.device
) -> Iterator[Any]:
    """Attach as a setting says. Uniform precisions are held without floors: hints stay out."""
    with attach(
        model,
        hints if setting.epsilon is not None else None,
        budget={Tier.HBM: setting.budget_bytes, Tier.SSD: None},
        precision=setting.precision,
        epsilon=setting.epsilon,
        device=device,
    ) as runtime:
        yield runtime


def _point(
    setting: Setting,
    fast_bytes: int,
    bytes_per_token: int,
    tokens_per_s: float,
    quality: Quality,
    *,
    bound_nats: float | None,
) -> Point:
    return Point(
        setting=setting,
        fast_bytes=fast_bytes,
        bytes_per_token=bytes_per_token,
        tokens_per_s=tokens_per_s,
        kl_nats=max(quality.kl_nats, 0.0),
        kl_interval=quality.kl_interval,
        perplexity=quality.perplexity,
        bound_nats=bound_nats,
    )
