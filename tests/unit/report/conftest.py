"""A made-up run folder with every part of a run: six layers, three tiers, both modes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lib.hints import ModelInfo, build_hints, save_hints

NUM_LAYERS, WIDTH, VOCABULARY = 6, 256, 8192
KINDS = {"ln_1": 2 * WIDTH, "attn": 4 * WIDTH**2, "ln_2": 2 * WIDTH, "mlp": 8 * WIDTH**2}


def block_params() -> dict[str, int]:
    """Block name -> number of weights, in model order."""
    params = {"transformer.wte": VOCABULARY * WIDTH, "transformer.wpe": 256 * WIDTH}
    for layer in range(NUM_LAYERS):
        params |= {f"transformer.h.{layer}.{kind}": size for kind, size in KINDS.items()}
    return {**params, "transformer.ln_f": 2 * WIDTH}


def write_hints(path: Path) -> None:
    """Save hints: norms matter most, later layers less, the position embedding is frozen."""
    params = block_params()
    density: dict[str, float | None] = {}
    for index, name in enumerate(params):
        scale = 1e-3 if "ln" in name else 2e-5 if "attn" in name else 6e-6
        density[name] = scale * math.exp(-0.11 * index)
    density["transformer.wpe"] = None
    signals: dict[str, dict[str, Any]] = {
        name: {} if value is None else {"adam_exp_avg_sq": value} for name, value in density.items()
    }
    for layer in range(NUM_LAYERS):
        heads = [0.95 - 0.1 * head - 0.02 * layer for head in range(8)]
        signals[f"transformer.h.{layer}.attn"]["attention_fim_trace"] = heads
    hints = build_hints(
        model=ModelInfo(
            id="run",
            revision="step 1500",
            class_name="GPT2LMHeadModel",
            parameter_digest=f"sha256:{'a' * 64}",
        ),
        provenance={
            "signal": "adam_exp_avg_sq",
            "created": "2026-01-02T03:04:05+00:00",
            "optimizer": "AdamW",
            "beta2": 0.95,
            "step": 1500,
            "tokens_per_update": 4096,
        },
        num_bytes={name: 4 * size for name, size in params.items()},
        num_params=params,
        density=density,
        signals=signals,
        reasons={"transformer.wpe": "frozen"},
        hbm_threshold=0.3,
        cpu_threshold=0.8,
    )
    save_hints(hints, path)


def benchmark_document(mode: str) -> dict[str, Any]:
    """A benchmark document as the script writes it."""
    params = block_params()
    weight_bytes = 4 * sum(params.values())
    names = list(params)
    tiers = {name: ("HBM", "CPU", "SSD")[index % 3] for index, name in enumerate(names)}
    rate = {"HBM": 800e9, "CPU": 150e9, "SSD": 2e9 if mode == "real" else 10e9}
    forwards = 20
    blocks = {
        name: {
            "tier": tier,
            "num_bytes": 4 * params[name],
            "calls": forwards,
            "bytes_moved": 4 * params[name] * forwards
            if tier == "SSD" or mode == "emulated"
            else 0,
            "transfer_seconds": forwards * 4 * params[name] / rate[tier]
            if tier == "SSD" or mode == "emulated"
            else 0.0,
            "compute_seconds": forwards * params[name] * 7e-10,
        }
        for name, tier in tiers.items()
    }
    transfer_ms = 1e3 * sum(block["transfer_seconds"] for block in blocks.values()) / forwards
    compute_ms = 1e3 * sum(block["compute_seconds"] for block in blocks.values()) / forwards
    mean = 1.1 + transfer_ms + compute_ms
    per_tier = {
        tier: sum(b["num_bytes"] for b in blocks.values() if b["tier"] == tier)
        for tier in ("HBM", "CPU", "SSD")
    }
    resident = weight_bytes if mode == "emulated" else per_tier["HBM"] + per_tier["CPU"]
    peak = weight_bytes if mode == "emulated" else resident + 4 * params["transformer.h.0.mlp"]
    timeline, clock = [], 0.0
    for _ in range(3):
        for name in names:
            clock += mean / len(names) * 1e-3
            if tiers[name] == "SSD" and mode == "real":
                timeline += [
                    [clock, resident + blocks[name]["num_bytes"]],
                    [clock + 2e-5, resident],
                ]
    stays: dict[str, Any] = {}
    for index, name in enumerate(names):
        if tiers[name] == "SSD":
            asked = [1e-3 * mean * (turn + (index - 2) / len(names)) for turn in range(3)]
            step = 1e-3 * mean / len(names)
            stays[name] = [[start, start + step, start + 2 * step] for start in asked]
    stays[names[-1]] = [[0.9e-3 * mean, 1e-3 * mean, None]]
    window = {"pass_seconds": [1e-3 * mean] * 3, "stays": stays}
    common = {"peak_rss_bytes": 612 * 2**20}
    tiered = {
        "latency_ms": {"mean": mean, "median": mean * 0.99, "p95": mean * 1.2, "n": forwards},
        "tokens_per_s": 512 / mean * 1e3,
        "peak_weight_bytes": peak,
        "peak_fast_memory_bytes": peak,
        "bytes_moved_per_forward": sum(block["bytes_moved"] for block in blocks.values())
        // forwards,
        "perplexity": 31.4159,
        "in_slots": window if mode == "real" else None,
        "transfer_ms_per_forward": transfer_ms,
        "stats": {
            "mode": mode,
            "clock": "virtual" if mode == "emulated" else "wall",
            "forwards": forwards,
            "bytes_per_tier": per_tier,
            "bytes_moved": sum(block["bytes_moved"] for block in blocks.values()),
            "transfer_seconds": transfer_ms * forwards * 1e-3,
            "compute_seconds": compute_ms * forwards * 1e-3,
            "resident_bytes": resident,
            "peak_resident_bytes": peak,
            "blocks": blocks,
            "timeline": timeline,
            "wait_error": None,
        },
        **common,
    }
    baseline = {
        "latency_ms": {
            "mean": compute_ms + 1,
            "median": compute_ms + 0.97,
            "p95": compute_ms + 1.4,
            "n": forwards,
        },
        "tokens_per_s": 512 / (compute_ms + 1) * 1e3,
        "peak_weight_bytes": weight_bytes,
        "peak_fast_memory_bytes": weight_bytes,
        "bytes_moved_per_forward": 0,
        "perplexity": 31.4159,
        "drift_pct": -1.3,
        **common,
    }
    return {
        "model": "runs/sample/checkpoint",
        "checkpoint": None,
        "tier_hints": "runs/sample/tier_hints.json",
        "class": "GPT2LMHeadModel",
        "num_blocks": len(names),
        "weight_bytes": weight_bytes,
        "device": "cpu",
        "device_name": "Example CPU @ 2.00GHz",
        "num_threads": 2,
        "dtype": "float32",
        "mode": mode,
        "measured": "wall-clock" if mode == "real" else "emulated (virtual clock)",
        "fast_memory": "weight storages resident",
        "batch_size": 4,
        "seq_length": 128,
        "num_iterations": forwards,
        "warmup": 3,
        "tokens_source": "held-out split of stdlib-3.11",
        "perplexity_tokens": 8128,
        "exact": exact_part(weight_bytes) if mode == "real" else None,
        "spec_file": None,
        "spec": None,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        "baseline": baseline,
        "tiered": tiered,
        "impact": {
            "latency_overhead_pct": 100 * (mean * 0.99 / (compute_ms + 0.97) - 1),
            "memory_saved_pct": 100 * (1 - tiered["peak_fast_memory_bytes"] / weight_bytes),
            "perplexity_delta": 0.0,
            "max_abs_logit_difference": 0.0,
            "logits_bit_identical": True,
            "logits_compared": 4194304,
        },
    }


def exact_part(weight_bytes: int) -> dict[str, Any]:
    """What a benchmark with --exact says of texts."""
    way = {"tokens_per_s": 50.0, "bytes_moved_per_token": 0, "peak_weight_bytes": weight_bytes}
    return {
        "sequences": 4,
        "prompt_tokens": 64,
        "new_tokens": 64,
        "resident": way,
        "streamed": {**way, "tokens_per_s": 9.5, "bytes_moved_per_token": weight_bytes // 2},
        "exact": {
            **way,
            "tokens_per_s": 61.25,
            "precision": "int8",
            "windows": 5,
            "mean_window": 11.6,
            "acceptance": 0.985,
        },
        "equal_tokens": 256,
        "tokens": 256,
    }


def write_metrics(path: Path) -> None:
    """A loss that falls from ln(vocabulary) with noise."""
    noise = np.random.default_rng(0).normal(0, 0.08, 1500)
    with path.open("w") as file:
        for step in range(1, 1501):
            loss = 3.4 + 5.6 * math.exp(-step / 180)
            entry = {
                "step": step,
                "loss": loss + noise[step - 1],
                "lr": 1e-3,
                "grad_norm": 1.0,
                "tokens_per_s": 9000.0,
            }
            file.write(json.dumps(entry) + "\n")
            if step % 250 == 0:
                file.write(json.dumps({"step": step, "heldout_loss": loss + 0.12}) + "\n")


def write_sample_run(directory: Path) -> Path:
    """Write a whole run folder."""
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    write_hints(directory / "tier_hints.json")
    write_metrics(directory / "metrics.jsonl")
    config = {
        "run": {"name": "sample", "seed": 1},
        "report": {"html": True, "dpi": 50},
        "data": {"source": "stdlib", "max_mib": 32, "heldout_permille": 20},
        "train": {"steps": 1500, "batch_size": 32, "accumulation": 1},
        "tiering": {
            "signal": "adam_state",
            "hbm_threshold": 0.3,
            "cpu_threshold": 0.8,
            "json_output": "tier_hints.json",
        },
    }
    model = {
        "model_type": "gpt2",
        "n_layer": NUM_LAYERS,
        "n_embd": WIDTH,
        "n_head": 8,
        "n_positions": 256,
        "vocab_size": 8192,
    }
    documents = {
        "config.json": config,
        "versions.json": {"python": "3.11.7", "torch": "2.13.0+cpu", "platform": "Linux <x86_64>"},
        "checkpoint/config.json": model,
        "benchmark_emulated.json": benchmark_document("emulated"),
        "benchmark_real.json": benchmark_document("real"),
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document))
    metadata = {"corpus": "stdlib-3.11", "unigram_entropy_nats": "6.2104"}
    save_file(
        {"tokens": np.zeros((4, 256), np.int64)},
        checkpoint / "heldout.safetensors",
        metadata=metadata,
    )
    return directory


@pytest.fixture
def sample_run(tmp_path: Path) -> Path:
    """The folder of a complete made-up run."""
    return write_sample_run(tmp_path / "runs" / "sample")


@pytest.fixture
def make_benchmark() -> Callable[[str], dict[str, Any]]:
    """Makes a benchmark document for a mode."""
    return benchmark_document
