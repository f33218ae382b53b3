"""What placing a model's weights does to its forward passes, against the untouched model: latency,
throughput, memory, bytes moved and perplexity.

One iteration is one forward pass over held-out text: logits for every position, no cache. Half of
the baseline's iterations run before the tiered ones and half after them, on the detached model, so
that a machine that grows slower does not count as overhead. docs/benchmark.md names the fields.
"""

import importlib.metadata
import math
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import parameter_digest, partition_model, storage_bytes, tied_modules
from ..checkpoint.models import cast_weights
from ..errors import InputError
from ..hints import Hints, match_hints
from ..machine import cpu_name
from ..policy.control import Settings
from ..precision.floors import parse_epsilon
from ..precision.quality import Quality
from ..tiering import Clock, EmulationSpec, Runtime, attach, specs_to_json
from ..tiering.planning.budget import Budget
from ..tiering.planning.needs import PrecisionChoice
from ..tiering.planning.plans import Mode
from ..vocabulary import Precision
from .canary import CANARY_SEQUENCES, Canary, measure_kl
from .decoding import DecodingSettings, check_decoding, measure_decoding
from .forwards import ForwardBench, fast_memory_note, latency_to_json
from .placed_passes import describe_passes, describe_stays

Fields = dict[str, Any]
"""A part of the JSON document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSettings:
    """How weights are placed (``attach``'s arguments) and what is timed.

    ``baseline``: measure the untouched model, too; always so under an ``epsilon``, a bound on the
    KL from that model. ``canary_every``: under an epsilon, measure the KL again after so many timed
    passes. ``exact``: also write text, exactly, within the budget (``measure_decoding``).
    ``dwell_ms``: run under a controller with that dwell (None: without one); needs a budget. Raises
    InputError for a number out of range, and for settings that exclude each other.
    """

    mode: Mode = "real"
    budget: Budget | None = None
    precision: PrecisionChoice = None
    epsilon: float | str | None = None
    emulation: EmulationSpec | None = None
    look_ahead: bool = True
    dwell_ms: int | None = None
    baseline: bool = True
    canary_every: int | None = None
    exact: bool = False
    num_iterations: int = 20
    warmup: int = 3
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("num_iterations", self.num_iterations, 1),
            ("warmup", self.warmup, 0),
            ("canary_every", self.canary_every, 1),
            ("dwell_ms", self.dwell_ms, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} {value} is too small: give {least} or more")
        if self.dwell_ms is not None and self.budget is None:
            raise InputError("dwell_ms has no effect without a budget: give both, or neither")
        if self.epsilon is not None:
            parse_epsilon(self.epsilon)
            object.__setattr__(self, "baseline", True)
        elif self.canary_every is not None:
            raise InputError("canary_every has no effect without epsilon: give both, or neither")
        if self.exact and (self.budget is None or self.mode != "real"):
            raise InputError("exact output divides a real budget: give a budget, and mode real")
        if self.exact and (self.precision is not None or self.epsilon is not None):
            raise InputError(
                "exact output is the full model's, and of its draft the width is chosen: leave "
                "precision and epsilon out, or exact"
            )

    @property
    def moves_whole(self) -> bool:
        """The model is on the device as a whole. In real mode alone attach brings each block to its
        place: the whole may not fit.
        """
        return self.mode == "emulated" or self.baseline


def benchmark(
    model: Any,
    tokens: Tensor,
    hints: Hints | None,
    settings: BenchmarkSettings,
    *,
    device: torch.device,
) -> Fields:
    """Measure a causal language model of transformers and return the figures as a document.

    ``tokens`` is held-out text, int64, (sequences, length). ``hints`` may be left out where there
    is a budget. ``model`` is on the device as ``prepare_model`` leaves it, and detached at the end.
    Raises what attach raises, and FloatingPointError for a loss that isn't
    finite.
    """
    if hints is None and settings.budget is None:
        raise InputError("nothing says where weights go: give hints, or a budget")
    bench = ForwardBench(
        model,
        tokens,
        batch_size=settings.batch_size,
        warmup=settings.warmup,
        device=device,
    )
    spec = settings.emulation
    decoding = DecodingSettings(settings.budget, device, resident=settings.moves_whole)
    if settings.exact:
        check_decoding(model, tokens, hints, decoding)  # before anything is timed
    batch = tokens[: settings.batch_size]
    return {
        **_describe(model, device),
        "seq_length": tokens.shape[1],
        "perplexity_tokens": bench.perplexity_tokens,
        "spec": None if spec is None else specs_to_json(spec),
        **_measure(bench, tokens, hints, settings),
        "exact": measure_decoding(model, batch, hints, decoding) if settings.exact else None,
    }


def prepare_model(
    model: nn.Module,
    hints: Hints | None,
    *,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Hints | None:
    """Check that the hints are this model's, cast it (None: as it is) and bring it to the device
    (None: leave it where it is); return hints for the cast weights.

    The check comes first because a cast to float16 rounds the weights into another identity.
    """
    if hints is not None:
        blocks = partition_model(model)
        match_hints(
            hints,
            [block.name for block in blocks],
            identify=partial(parameter_digest, model),
            tied=tied_modules(blocks),
        )
    if dtype is not None:
        cast_weights(model, dtype)
    model.to(device=device)
    if hints is None or hints.model is None or dtype is None:
        return hints
    return replace(hints, model=replace(hints.model, parameter_digest=parameter_digest(model)))


def _measure(
    bench: ForwardBench, tokens: Tensor, hints: Hints | None, settings: BenchmarkSettings
) -> Fields:
    """Run the baseline if it was asked for, the tiered model, and the baseline's second half."""
    # Where weights really leave the device its allocator says what the model needs; elsewhere the
    # weights in fast memory are what tiering changes.
    allocator = bench.device.type == "cuda" and settings.mode == "real"
    baseline_bytes = storage_bytes(bench.model.parameters())
    baseline: Fields | None = None
    impact: Fields | None = None
    compressed = settings.precision is not None or settings.epsilon is not None
    measured: Quality | None = None
    canary: Canary | None = None
    num_before = (settings.num_iterations + 1) // 2
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.safetensors"
        if settings.baseline:
            # These first: what a process touches once then is in memory for both timed runs.
            perplexity = bench.perplexity("baseline")
            bench.save_logits(logits)
            if compressed:
                bench.save_reference(Path(folder))
            if settings.epsilon is not None:
                canary = measure_kl(
                    bench.model, tokens[-CANARY_SEQUENCES:], batch_size=settings.batch_size
                )
            before, memory = bench.run("baseline", iterations=num_before)
            baseline = {**memory, "bytes_moved_per_forward": 0, "perplexity": perplexity}
        bench.release_memory()
        with attach(
            bench.model,
            hints,
            mode=settings.mode,
            budget=settings.budget,
            precision=settings.precision,
            epsilon=settings.epsilon,
            measure=canary,
            emulation=settings.emulation,
            look_ahead=settings.look_ahead,
            device=bench.device,
        ) as runtime:
            if settings.dwell_ms is not None:
                runtime.control(settings=Settings(dwell_us=1000 * settings.dwell_ms))
            times, memory = bench.run(
                "tiered",
                iterations=settings.num_iterations,
                virtual_seconds=lambda: runtime.virtual_seconds,
                on_warm=runtime.reset_stats,
                after_pass=lambda passes: _check(
                    runtime, canary, passes, every=settings.canary_every
                ),
            )
            stats = runtime.stats()
            tiered: Fields = {**memory, "in_slots": describe_stays(runtime, times)}
            tiered["perplexity"] = bench.perplexity("tiered")
            if baseline is not None:
                impact = bench.compare_logits(logits)
                measured = bench.compare_reference(Path(folder)) if compressed else None
            quality = _quality(runtime, canary, every=settings.canary_every) if compressed else None
    if baseline is not None:
        after, _ = bench.run("baseline again", iterations=settings.num_iterations - num_before)
        drift = _percent(statistics.median(after), statistics.median(before)) if after else None
        baseline |= {**_latency(bench, before + after), "drift_pct": drift}
        _add_memory(baseline, baseline_bytes, allocator=allocator)
    tiered |= {**_latency(bench, times), **describe_passes(stats)}
    _add_memory(tiered, stats.peak_resident_bytes, allocator=allocator)
    if baseline is not None and impact is not None:
        impact |= _compare(baseline, tiered, settings.mode)
    if quality is not None:
        quality |= _measured_quality(quality, measured, baseline, tiered)
    virtual = stats.clock == Clock.VIRTUAL
    return {
        "measured": "emulated (virtual clock)" if virtual else "wall-clock",
        "fast_memory": fast_memory_note(settings.mode, allocator=allocator),
        "baseline": baseline,
        "tiered": tiered,
        "impact": impact,
        "quality": quality,
    }


def _check(runtime: Runtime, canary: Canary | None, passes: int, *, every: int | None) -> None:
    """Measure after every so many passes, and let the runtime hold the model more precisely."""
    if canary is not None and every is not None and passes % every == 0:
        runtime.check_quality(canary)


def _quality(runtime: Runtime, canary: Canary | None, *, every: int | None) -> Fields:
    """Return what blocks are held in, what the veto knows of that, and what the canary found."""
    places = [place.precision for place in runtime.plan.placements.values()]
    return {
        "precisions": {str(p): places.count(p) for p in Precision if p in places},
        "veto": runtime.veto.to_json(),
        "canary": None if canary is None else _canary_to_json(canary, runtime, every),
    }


def _canary_to_json(canary: Canary, runtime: Runtime, every: int | None) -> Fields:
    """Return what was measured, in nats per token, and how often that raised floors."""
    return {
        "every": every,
        "sequences": canary.num_sequences,
        "measured": [[value.kl_nats, value.upper_nats] for value in canary.measured],
        "floors_raised": runtime.veto.num_raised,
    }


def _measured_quality(
    quality: Fields, measured: Quality | None, baseline: Fields | None, tiered: Fields
) -> Fields:
    """Return what precision does cost, beside what it was predicted to."""
    if measured is None or baseline is None:
        return {"measured": None, "perplexity": None}
    predicted = quality["veto"]["predicted_nats"]
    return {
        "measured": measured.to_json(),
        "perplexity": {
            "predicted": None
            if predicted is None
            else baseline["perplexity"] * math.exp(predicted),
            "measured": tiered["perplexity"],
        },
    }


def _describe(model: nn.Module, device: torch.device) -> Fields:
    """Return the fields that say what was measured, and on what."""
    return {
        "class": type(model).__name__,
        "num_blocks": len(partition_model(model)),
        "weight_bytes": storage_bytes(model.parameters()),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
    }


def _latency(bench: ForwardBench, seconds: Sequence[float]) -> Fields:
    rate = bench.tokens_per_second(seconds)
    return {"latency_ms": latency_to_json(seconds), "tokens_per_s": rate}


def _compare(baseline: Fields, tiered: Fields, mode: Mode) -> Fields:
    latency = [part["latency_ms"]["median"] for part in (tiered, baseline)]
    memory = [part["peak_fast_memory_bytes"] for part in (tiered, baseline)]
    return {
        "latency_overhead_pct": _percent(*latency),
        "memory_saved_pct": 100 * (1 - memory[0] / memory[1]) if mode == "real" else None,
        "perplexity_delta": tiered["perplexity"] - baseline["perplexity"],
    }


def _add_memory(part: Fields, peak_weight_bytes: int, *, allocator: bool) -> None:
    fast = part["peak_allocated_bytes"] if allocator else peak_weight_bytes
    part |= {"peak_weight_bytes": peak_weight_bytes, "peak_fast_memory_bytes": fast}


def _percent(value: float, reference: float) -> float:
    """Return by how many percent ``value`` is above ``reference``."""
    return (value / reference - 1) * 100
