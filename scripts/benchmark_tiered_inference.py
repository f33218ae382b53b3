"""Measure what a tier_hints.json does to inference, against the untouched model.

    python scripts/benchmark_tiered_inference.py --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json --mode real --baseline --json out.json

Latency, throughput, memory, bytes moved and perplexity. One iteration is one forward pass over
held-out text: logits for every position, no cache. Half of the baseline's iterations run before the
tiered ones and half after them, on the detached model, so that a machine that grows slower does not
count as overhead. stdout gets three sections and, as its last line, one JSON document, whose fields
docs/benchmark.md names.
"""

import argparse
import math
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from lib.blocks import parameter_digest, partition_model, storage_bytes, tied_modules
from lib.checkpoint.models import cast_weights, load_model, quiet_transformers
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import parse_device
from lib.errors import InputError
from lib.evaluation.canary import CANARY_SEQUENCES, Canary, measure_kl
from lib.evaluation.forwards import ForwardBench, latency_to_json
from lib.files import check_writable
from lib.hints import Hints, load_hints, match_hints
from lib.machine import cpu_name
from lib.precision.floors import parse_epsilon
from lib.precision.quality import Quality
from lib.report import benchmark_sections, transfer_ms
from lib.text.held_out import load_heldout
from lib.tiering import (
    Clock,
    EmulationSpec,
    Runtime,
    Stats,
    attach,
    load_specs,
    specs_to_json,
)
from lib.tiering.planning.budget import read_budget
from lib.vocabulary import Precision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_LENGTH = 128
TIMELINE_FORWARDS = 3
"""Forward passes whose resident bytes are kept in the document; the pattern repeats."""

Fields = dict[str, Any]
"""A part of the JSON document."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _check_numbers(args)
    check_writable(args.json)
    device = parse_device(args.device)
    emulation = _read_spec(args)
    hints = _read_hints(args.tier_hints)
    progress = sys.stderr.isatty()
    quiet_transformers(progress=progress)
    model = load_model(args.model, args.checkpoint)
    length = _sequence_length(args.seq_length, model)
    vocab_size = model.config.get_text_config().vocab_size
    text = load_heldout(args.model, vocab_size=vocab_size, length=length)
    # In real mode alone attach brings each block to its place: the whole may not fit the device.
    moves_whole = args.mode == "emulated" or args.baseline
    dtype = DTYPES.get(args.dtype)
    hints = _cast_model(model, hints, device=device if moves_whole else None, dtype=dtype)
    bench = ForwardBench(
        model,
        text.tokens,
        batch_size=args.batch_size,
        warmup=args.warmup,
        device=device,
        progress=progress,
    )
    document = {
        **_describe(args, model, device),
        "seq_length": length,
        "tokens_source": text.source,
        "perplexity_tokens": bench.perplexity_tokens,
        "spec": None if emulation is None else specs_to_json(emulation),
        **measure(bench, text.tokens, hints, emulation, args=args),
    }
    print(benchmark_sections(document), end="\n\n")
    emit_json(document, args.json)
    return 0


def measure(
    bench: ForwardBench,
    tokens: torch.Tensor,
    hints: Hints,
    emulation: EmulationSpec | None,
    *,
    args: argparse.Namespace,
) -> Fields:
    """Run the baseline if it was asked for, the tiered model, and the baseline's second half."""
    # Where weights really leave the device its allocator says what the model needs; elsewhere the
    # weights in fast memory are what tiering changes.
    allocator = bench.device.type == "cuda" and args.mode == "real"
    baseline_bytes = storage_bytes(bench.model.parameters())
    baseline: Fields | None = None
    impact: Fields | None = None
    compressed = args.precision is not None or args.epsilon is not None
    measured: Quality | None = None
    canary: Canary | None = None
    num_before = (args.num_iterations + 1) // 2
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.safetensors"
        if args.baseline:
            # These first: what a process touches once then is in memory for both timed runs.
            perplexity = bench.perplexity("baseline")
            bench.save_logits(logits)
            if compressed:
                bench.save_reference(Path(folder))
            if args.epsilon is not None:
                canary = measure_kl(
                    bench.model, tokens[-CANARY_SEQUENCES:], batch_size=args.batch_size
                )
            before, memory = bench.run("baseline", iterations=num_before)
            baseline = {**memory, "bytes_moved_per_forward": 0, "perplexity": perplexity}
        bench.release_memory()
        with attach(
            bench.model,
            hints,
            mode=args.mode,
            budget=None if args.budget is None else read_budget(args.budget),
            precision=args.precision,
            epsilon=args.epsilon,
            measure=canary,
            emulation=emulation,
            device=bench.device,
        ) as runtime:
            times, memory = bench.run(
                "tiered",
                iterations=args.num_iterations,
                virtual_seconds=lambda: runtime.virtual_seconds,
                on_warm=runtime.reset_stats,
                after_pass=lambda passes: _check(runtime, canary, passes, every=args.canary),
            )
            stats = runtime.stats()
            tiered: Fields = {**memory, "perplexity": bench.perplexity("tiered")}
            if baseline is not None:
                impact = bench.compare_logits(logits)
                measured = bench.compare_reference(Path(folder)) if compressed else None
            quality = _quality(runtime, canary, every=args.canary) if compressed else None
    if baseline is not None:
        after, _ = bench.run("baseline again", iterations=args.num_iterations - num_before)
        drift = _percent(statistics.median(after), statistics.median(before)) if after else None
        baseline |= {**_latency(bench, before + after), "drift_pct": drift}
        _add_memory(baseline, baseline_bytes, allocator=allocator)
    tiered |= {**_latency(bench, times), **_transfer(stats)}
    _add_memory(tiered, stats.peak_resident_bytes, allocator=allocator)
    if baseline is not None and impact is not None:
        impact |= _compare(baseline, tiered)
    if quality is not None:
        quality |= _measured_quality(quality, measured, baseline, tiered)
    virtual = stats.clock == Clock.VIRTUAL
    return {
        "measured": "emulated (virtual clock)" if virtual else "wall-clock",
        "fast_memory": _fast_memory_note(args.mode, allocator=allocator),
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


def _describe(args: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> Fields:
    """Return the fields that say what was measured, and on what."""
    return {
        "model": args.model,
        "checkpoint": None if args.checkpoint is None else str(args.checkpoint),
        "tier_hints": str(args.tier_hints),
        "class": type(model).__name__,
        "num_blocks": len(partition_model(model)),
        "weight_bytes": storage_bytes(model.parameters()),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "mode": args.mode,
        "budget": args.budget,
        "precision": args.precision,
        "epsilon": args.epsilon,
        "canary": args.canary,
        "spec_file": None if args.spec is None else str(args.spec),
        "batch_size": args.batch_size,
        "num_iterations": args.num_iterations,
        "warmup": args.warmup,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _latency(bench: ForwardBench, seconds: Sequence[float]) -> Fields:
    rate = bench.tokens_per_second(seconds)
    return {"latency_ms": latency_to_json(seconds), "tokens_per_s": rate}


def _transfer(stats: Stats) -> Fields:
    """Return what the runtime did per pass, and its own figures, the timeline cut to few passes."""
    document = stats.to_json()
    timeline = document["timeline"]
    few = timeline[: math.ceil(len(timeline) / stats.forwards) * TIMELINE_FORWARDS]
    changes = [now for last, now in zip([(), *few], few, strict=False) if last[1:] != now[1:]]
    return {
        "bytes_moved_per_forward": round(stats.bytes_moved / stats.forwards),
        "transfer_ms_per_forward": transfer_ms(document),
        "stats": {**document, "timeline": changes},
    }


def _compare(baseline: Fields, tiered: Fields) -> Fields:
    latency = [part["latency_ms"]["median"] for part in (tiered, baseline)]
    memory = [part["peak_fast_memory_bytes"] for part in (tiered, baseline)]
    return {
        "latency_overhead_pct": _percent(*latency),
        "memory_saved_pct": 100 * (1 - memory[0] / memory[1]),
        "perplexity_delta": tiered["perplexity"] - baseline["perplexity"],
    }


def _add_memory(part: Fields, peak_weight_bytes: int, *, allocator: bool) -> None:
    fast = part["peak_allocated_bytes"] if allocator else peak_weight_bytes
    part |= {"peak_weight_bytes": peak_weight_bytes, "peak_fast_memory_bytes": fast}


def _fast_memory_note(mode: str, *, allocator: bool) -> str:
    if allocator:
        return "CUDA allocator's peak: weights and activations"
    return (
        "weight storages resident"
        if mode == "real"
        else "weight storages resident: emulation moves nothing"
    )


def _cast_model(
    model: torch.nn.Module, hints: Hints, *, device: torch.device | None, dtype: torch.dtype | None
) -> Hints:
    """Check that the hints are this model's and cast it; return hints for the cast weights.

    The check comes first because a cast to float16 rounds the weights into another identity.
    """
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
    if hints.model is None:
        return hints
    return replace(hints, model=replace(hints.model, parameter_digest=parameter_digest(model)))


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--seq-length", args.seq_length, 2),
        ("--num-iterations", args.num_iterations, 1),
        ("--warmup", args.warmup, 0),
        ("--canary", args.canary, 1),
    ):
        if value is not None and value < least:
            raise InputError(f"{flag} {value} is too small: give {least} or more")
    if args.canary is not None and args.epsilon is None:
        raise InputError("--canary has no effect without --epsilon: give both, or neither")
    if args.epsilon is not None:
        parse_epsilon(args.epsilon)
        args.baseline = True  # a bound on the KL from the full model is judged beside that model


def _sequence_length(asked: int | None, model: Any) -> int:
    """Return the tokens per sequence that were asked for, or a default that the context holds."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    if context is not None and asked > context:
        raise InputError(
            f"--seq-length {asked} is longer than the model's context: give {context} or less"
        )
    return asked


def _read_hints(path: Path) -> Hints:
    """Load the hints; their warnings become one line each on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hints = load_hints(path)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return hints


def _read_spec(args: argparse.Namespace) -> EmulationSpec | None:
    """Return the emulated machine, or None in real mode, where nothing is emulated."""
    spec = EmulationSpec() if args.spec is None else load_specs(args.spec)
    if args.mode == "emulated":
        return spec
    if args.spec is not None:
        print(
            "warning: --spec has no effect with --mode real: nothing is emulated", file=sys.stderr
        )
    return None


def _percent(value: float, reference: float) -> float:
    """Return by how many percent ``value`` is above ``reference``."""
    return (value / reference - 1) * 100


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Benchmark a causal language model, its weights placed by tier_hints.json.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=True, help="Hub id, or folder with config.json and weights"
    )
    model.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights to load instead: .safetensors, or .pt with tensors only",
    )
    model.add_argument(
        "--tier-hints",
        required=True,
        type=Path,
        metavar="FILE",
        help="tier_hints.json of this model",
    )
    model.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="auto = the checkpoint's own (default: %(default)s)",
    )
    tiers = parser.add_argument_group("tiering")
    tiers.add_argument(
        "--mode",
        default="emulated",
        choices=["emulated", "real"],
        help="charge the time of hypothetical tiers, or move the weights (default: %(default)s)",
    )
    tiers.add_argument(
        "--budget",
        metavar="TIER=SIZE,...",
        help="place by bytes per tier, not by the hints: HBM=700MiB,SSD= (no size: no limit)",
    )
    tiers.add_argument(
        "--precision",
        choices=[str(precision) for precision in Precision],
        help="hold the weights so, or at their floor (default: as they are, lossless)",
    )
    tiers.add_argument(
        "--epsilon",
        metavar="BOUND",
        help="fewest bytes within this KL from the full model: 0.02 (nats per token) or ppl=1.02; "
        "needs calibrated hints, and implies --baseline (default: no bound)",
    )
    tiers.add_argument(
        "--canary",
        type=int,
        metavar="N",
        help="with --epsilon, measure the KL again after every N timed passes, on 16 held-out "
        "sequences, and hold blocks more precisely where it is above (default: once, before)",
    )
    tiers.add_argument(
        "--spec",
        type=Path,
        metavar="FILE",
        help="JSON of the emulated tiers and clock (default: built in)",
    )
    tiers.add_argument(
        "--baseline", action="store_true", help="measure the untouched model too, and compare"
    )
    work = parser.add_argument_group("workload")
    work.add_argument(
        "--batch-size",
        type=int,
        default=4,
        help="sequences per forward pass (default: %(default)s)",
    )
    work.add_argument(
        "--seq-length",
        type=int,
        help=f"tokens per sequence (default: {DEFAULT_LENGTH}, or the context if shorter)",
    )
    work.add_argument(
        "--num-iterations", type=int, default=20, help="timed forward passes (default: %(default)s)"
    )
    work.add_argument(
        "--warmup", type=int, default=3, help="untimed passes before them (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
