"""From what workers measured to the figures of the document: pure functions of plain data.

link utilisation = bytes moved / sum over segments of (time x bandwidth), the bandwidth of a segment
being the mean of the probes before and after it; the physical limit of a token = max(compute time,
bytes / bandwidth).

Computing and reading slow each other, so even perfect overlap leaves some of the link unused. With
a model that computes for C seconds per token, s (slowdown) longer beside reads, which have a share
r of their bandwidth left meanwhile (``Contention``), and L seconds of reading alone:

    attainable utilisation = L / max(L + (1 - r) (1 + s) C,  (1 + s) C)
"""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.units import MIB

Fields = dict[str, Any]
"""A part of the JSON document."""
RATIOS = {
    "lossless_1500": ("ours-lossless", 1500),
    "lossless_1100": ("ours-lossless", 1100),
    "int8_900": ("ours-int8", 900),
    "int4_600": ("ours-int4", 600),
}
"""Ours over the best peer under the same limit (MiB)."""


def summarize_run(
    results: Sequence[Fields],
    *,
    compute_seconds: float | None,
    contention: Fields | None = None,
) -> Fields:
    """Return the figures of one system under one limit, over the rounds that it was run.

    Of a system that drafts the mean counts, since tokens come in windows, and its limit is the rate
    of drafting, or that of the link. Of others ``compute_seconds`` is what a token takes with every
    weight in place, where that is known;
    ``contention``: the fields of ``lib.tiering.probe.links.Contention``.
    """
    timed = [
        (interval, result)
        for result in results
        for interval in result["intervals"]
        if interval["timed"]
    ]
    seconds = [interval["seconds"] for interval, _ in timed]
    counted_by = results[0]["counted_by"]
    moved = [_moved_bytes(interval, result) for interval, result in timed]
    num_bytes = None if counted_by is None else sum(moved)
    could_move = sum(
        interval["seconds"] * _segment_bandwidth(result, interval["segment"])
        for interval, result in timed
    )
    drafting = results[-1].get("drafting")
    if drafting is not None:
        rate = drafting["draft_tokens_per_s"]
        compute_seconds, contention = rate and 1 / rate, None
    bandwidth = could_move / sum(seconds)
    per_token = None if num_bytes is None else num_bytes / len(timed)
    limits = [compute_seconds or 0.0, (per_token or 0.0) / bandwidth]
    typical = statistics.median(seconds) if drafting is None else statistics.mean(seconds)
    return {
        "tokens_per_s": {
            "median": 1 / typical,
            "p95": 1 / float(np.percentile(seconds, 95)) if drafting is None else None,
            "n": len(seconds),
        },
        **(drafting or {}),
        "ttft_s": statistics.median(result["intervals"][0]["seconds"] for result in results),
        "load_s": statistics.median(result["load_seconds"] for result in results),
        "bytes_per_token": None if per_token is None else round(per_token),
        "bytes_counted_by": counted_by,
        "disk_bytes_per_token": round(
            statistics.mean(interval["disk_bytes"] for interval, _ in timed)
        ),
        "link_gb_s": bandwidth / 1e9,
        "link_utilisation": None if num_bytes is None else num_bytes / could_move,
        "attainable_utilisation": _attainable(limits[1], compute_seconds, contention),
        "limit_tokens_per_s": 1 / max(limits)
        if num_bytes is not None and max(limits) > 0
        else None,
    }


def summarize_failure() -> Fields:
    """Return the figures of a run that did not survive: none."""
    names = (
        "ttft_s",
        "load_s",
        "bytes_per_token",
        "link_utilisation",
        "attainable_utilisation",
        "limit_tokens_per_s",
    )
    nothing: Fields = {"tokens_per_s": {"median": None, "p95": None, "n": 0}}
    return nothing | dict.fromkeys(names)


def compare_to_resident(result: Fields, resident: Fields) -> Fields:
    """Compare a run with the resident model over the passes that both have made.

    ``first_kl_nats`` is KL(resident || run) of the first pass: later ones follow other tokens.
    """
    common = min(len(result["tokens"]), len(resident["tokens"]))
    ours_SV, resident_SV = (part["logits_SV"][:common] for part in (result, resident))
    pairs = zip(result["tokens"][:common], resident["tokens"][:common], strict=True)
    same = [ours == theirs for ours, theirs in pairs]
    return {
        "passes": common,
        "bit_equal": all(same) and ours_SV.tobytes() == resident_SV.tobytes(),
        "logits_digest": hashlib.sha256(ours_SV.tobytes()).hexdigest()[:16],
        "tokens_equal": sum(same),
        "tokens_equal_at_start": [*same, False].index(False),
        "first_max_abs_diff": float(np.abs(ours_SV[0] - resident_SV[0]).max()),
        "first_kl_nats": _kl_nats(resident_SV[0], ours_SV[0]),
    }


def add_ratios(runs: Sequence[Fields], *, gpu_limit_mib: int | None = None) -> Fields:
    """Put each run's ratios to its peers into it; return the document's, those of exact output by
    limit: to the best peer that runs the same PyTorch model, and to llama.cpp apart.

    ``gpu_limit_mib``: the runs are those of a GPU, and this limit of it is looked at.
    """
    speeds = {(run["name"], run["limit_mib"]): run["tokens_per_s"]["median"] for run in runs}
    for run in runs:
        speed, limit = run["tokens_per_s"]["median"], run["limit_mib"]
        run["ratio_to_accelerate"] = _ratio(speed, speeds.get(("accelerate", limit)))
        run["ratio_to_best_peer"] = _ratio(speed, _best_peer(runs, limit))
    ratios: Fields = {
        key: _ratio(speeds.get((name, limit)), _best_peer(runs, limit))
        for key, (name, limit) in RATIOS.items()
    }
    resident = speeds.get(("resident", None))
    for precision, limit in (("int8", 900), ("int4", 600)):
        ours = speeds.get((f"ours-{precision}", gpu_limit_mib or limit))
        ratios[f"{precision}_vs_resident"] = _ratio(ours, resident)
    if gpu_limit_mib is not None:
        lossless, int4, accelerate = (
            speeds.get((name, gpu_limit_mib))
            for name in ("ours-lossless", "ours-int4", "accelerate")
        )
        diffusers = [run for run in runs if run["name"].startswith("diffusers-")]
        ratios["cuda_lossless_vs_diffusers"] = _ratio(
            lossless, _best_peer(diffusers, gpu_limit_mib)
        )
        ratios["cuda_lossless_vs_accelerate"] = _ratio(lossless, accelerate)
        ratios["cuda_int4_vs_lossless"] = _ratio(int4, lossless)
    of_same_model = [run for run in runs if not run["name"].startswith("llama.cpp")]
    for run in runs:
        if run["name"] == "ours-exact":
            limit = run["limit_mib"]
            for what, other in (
                ("best_peer", _best_peer(of_same_model, limit)),
                ("llama_cpp", speeds.get(("llama.cpp", limit))),
                ("lossless", speeds.get(("ours-lossless", limit))),
                ("resident", resident),
            ):
                of_limits = ratios.setdefault(f"exact_vs_{what}", {})
                of_limits[str(limit)] = _ratio(run["tokens_per_s"]["median"], other)
    return ratios


def table(runs: Sequence[Fields]) -> str:
    """Return the runs as a table for people; beside a GPU's peak stands what is pinned for it."""
    beside = "pinned" if any("pinned_mib" in run for run in runs) else "peak_anon"
    head = (
        "system",
        "limit MiB",
        "tokens/s",
        "p95",
        "n",
        "TTFT s",
        "peak MiB",
        "pinned MiB" if beside == "pinned" else "anon MiB",
        "MiB/token",
        "link",
        "attainable",
        "limit tok/s",
        "x accelerate",
        "x best peer",
        "as resident",
    )
    rows = [head, *(_row(run, f"{beside}_mib") for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(run: Mapping[str, Any], beside: str) -> tuple[str, ...]:
    rate = run["tokens_per_s"]
    match = run["match"]
    if match is None:
        verdict = run["reason"] or "-"
    elif match["bit_equal"]:
        verdict = "bit for bit"
    else:
        verdict = f"{match['tokens_equal']}/{match['passes']} tokens"
    moved = run["bytes_per_token"]
    return (
        run["label"],
        "none" if run["limit_mib"] is None else str(run["limit_mib"]),
        _number(rate["median"]),
        _number(rate["p95"]),
        str(rate["n"]),
        _number(run["ttft_s"]),
        _number(run["peak_mib"], "{:.0f}"),
        _number(run.get(beside), "{:.0f}"),
        _number(None if moved is None else moved / MIB, "{:.0f}"),
        _number(run["link_utilisation"], "{:.0%}"),
        _number(run["attainable_utilisation"], "{:.0%}"),
        _number(run["limit_tokens_per_s"]),
        _number(run["ratio_to_accelerate"]),
        _number(run["ratio_to_best_peer"]),
        verdict,
    )


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value / reference


def _best_peer(runs: Sequence[Fields], limit_mib: int | None) -> float | None:
    rates = [
        run["tokens_per_s"]["median"]
        for run in runs
        if run["peer"]
        and run["limit_mib"] == limit_mib
        and run["survived"]
        and run.get("full_precision", True)  # what is lossy is no peer of what isn't
    ]
    return max(rates, default=None)


def _attainable(
    link_seconds: float, compute_seconds: float | None, contention: Fields | None
) -> float | None:
    if not link_seconds or compute_seconds is None or contention is None:
        return None
    computing = compute_seconds * (1 + contention["slowdown"])
    lost = computing * (1 - contention["link_share"])
    return link_seconds / max(link_seconds + lost, computing)


def _moved_bytes(interval: Fields, result: Fields) -> int:
    """Return the bytes that moved for a token, as far as they are known."""
    counted_by = result["counted_by"]
    if counted_by == "weights per pass":
        return int(result["bytes_per_pass"])
    return int(interval["moved_bytes" if counted_by == "runtime" else "disk_bytes"])


def _segment_bandwidth(result: Fields, segment: int) -> float:
    """Segment 1 lies between the first two probes; segment 0, before them, is the prefill."""
    probes = result["link_bytes_per_s"]
    return float((probes[segment - 1] + probes[segment]) / 2)


def _kl_nats(reference_V: Any, other_V: Any) -> float:
    def log_softmax(logits_V: Any) -> Any:
        shifted = logits_V.astype(np.float64) - logits_V.max()
        return shifted - np.log(np.exp(shifted).sum())

    log_p, log_q = log_softmax(reference_V), log_softmax(other_V)
    return float((np.exp(log_p) * (log_p - log_q)).sum())
