"""Benchmark documents as text: one run in sections, and several runs side by side.

A benchmark document is what ``tierhints benchmark --json`` writes; its fields are in
docs/benchmark.md. Pure: documents in, text out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..tiering.telemetry import blocks_transfer_ms, transfer_ms
from ..units import format_bytes
from ..vocabulary import Tier
from .decoding import decoding_table

Document = Mapping[str, Any]
MISSING = "-"
DRIFT_LIMIT_PCT = 10.0
"""Change of the baseline over the run beyond which the overhead is not to be relied on."""


class TierRow(NamedTuple):
    """One tier's share of a tiered run, per forward pass."""

    tier: str
    num_blocks: int
    num_bytes: int
    moved_bytes: int
    transfer_ms: float


def benchmark_sections(document: Document) -> str:
    """Return one run as text: what was run, baseline, tiered, and the impact of tiering."""
    mode, clock = document["mode"], name_clock(document)
    sections = {
        f"{mode} tiering on {document['device']}": _workload_rows(document),
        "baseline: all weights in fast memory (measured)": _baseline_rows(document),
        f"tiered: {mode} ({clock})": _tiered_rows(document),
        "impact: tiered against baseline": _impact_rows(document),
    }
    if document.get("quality"):
        sections["quality: precision against the full model"] = _quality_rows(document)
    texts = [f"{title}\n{_align(rows)}" for title, rows in sections.items()]
    if document.get("exact"):
        texts.append(f"exact output\n{decoding_table(document['exact'])}")
    return "\n\n".join(texts)


def benchmark_table(documents: Sequence[Document]) -> str:
    """Return baseline and the tiered runs side by side, a column per run.

    The baseline column is of the first run that has one; each run's overhead is against its own
    baseline, taken in the same process. Notes below say so, and say it when a run was not steady.
    """
    if not documents:
        return "no benchmark was run"
    table = comparison_rows(documents)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    lines.insert(2, "  ".join("-" * width for width in widths))
    text = "\n".join([*lines, *comparison_notes(documents)])
    parts = [document["exact"] for document in documents if document.get("exact")]
    return "\n\n".join([text, *map(decoding_table, parts)])


def comparison_rows(documents: Sequence[Document]) -> list[list[str]]:
    """Return the side-by-side cells: names, how each was measured, then a row per quantity."""
    baseline = next((document["baseline"] for document in documents if document["baseline"]), None)
    rows = [
        ["", "baseline", *(f"tiered, {document['mode']}" for document in documents)],
        ["", "measured", *(name_clock(document) for document in documents)],
    ]
    parts = [baseline, *(document["tiered"] for document in documents)]
    for name, show in _QUANTITIES.items():
        rows.append([name, *(MISSING if part is None else show(part) for part in parts)])
    rows.append(["charged by tiers", MISSING, *map(_show_charged, documents)])
    impacts = [document["impact"] for document in documents]
    for name, show in _IMPACTS.items():
        cells = [MISSING if impact is None else show(impact) for impact in impacts]
        rows.append([name, MISSING, *cells])
    return rows


def comparison_notes(documents: Sequence[Document]) -> list[str]:
    """Return what a reader of the side-by-side table must know."""
    first = documents[0]
    notes = [
        f"one forward pass = {first['batch_size']} x {first['seq_length']} tokens; "
        f"{first['device_name']}, {first['dtype']}; "
        f"n = {first['num_iterations']} after {first['warmup']} warm-up"
    ]
    measured = [document for document in documents if document["baseline"]]
    if len(measured) > 1:
        medians = [
            f"{format_ms(document['baseline']['latency_ms']['median'])} ({document['mode']})"
            for document in measured
        ]
        notes.append(f"overhead: against each run's own baseline, median {', '.join(medians)}")
    for document in measured:
        if not is_steady(document):
            notes.append(f"the {document['mode']} run's overhead: {drift_note(document)}")
    return notes


def name_clock(document: Document) -> str:
    """Say where a tiered run's times come from: measured, or how they were emulated."""
    if document["mode"] == "real":
        return "measured"
    virtual = document["measured"].startswith("emulated")
    return "virtual clock" if virtual else "emulated waits"


def is_steady(document: Document) -> bool:
    """Say whether the machine was steady enough for the run's overhead to mean something."""
    drift = (document["baseline"] or {}).get("drift_pct")
    return drift is None or abs(drift) <= DRIFT_LIMIT_PCT


def drift_note(document: Document) -> str:
    """Say by how much the machine was not steady."""
    drift = document["baseline"]["drift_pct"]
    return f"not reliable, the baseline itself changed by {drift:+.0f} % meanwhile (busy machine?)"


def tier_rows(document: Document) -> list[TierRow]:
    """Return what each tier holds and moves, nearest tier first."""
    stats = document["tiered"]["stats"]
    forwards = stats["forwards"]
    rows = []
    for tier in Tier:
        blocks = [block for block in stats["blocks"].values() if block["tier"] == tier]
        if blocks:
            row = TierRow(
                tier=str(tier),
                num_blocks=len(blocks),
                num_bytes=sum(block["num_bytes"] for block in blocks),
                moved_bytes=round(sum(block["bytes_moved"] for block in blocks) / forwards),
                transfer_ms=blocks_transfer_ms(blocks, mode=stats["mode"], forwards=forwards),
            )
            rows.append(row)
    return rows


def charged_overhead_pct(document: Document) -> float | None:
    """Return a virtual clock's charge in percent of the baseline's median; None without a clock."""
    baseline = document["baseline"]
    if baseline is None or name_clock(document) != "virtual clock":
        return None
    median: float = baseline["latency_ms"]["median"]
    return 100 * transfer_ms(document["tiered"]["stats"]) / median


def format_ms(milliseconds: float | None) -> str:
    """Print milliseconds with about four significant digits; a dash for none."""
    if milliseconds is None:
        return MISSING
    decimals = 3 if milliseconds < 10 else 2 if milliseconds < 100 else 1
    return f"{milliseconds:.{decimals}f} ms"


def _show_charged(document: Document) -> str:
    percent = charged_overhead_pct(document)
    return MISSING if percent is None else f"{percent:+.1f} %"


def _show_saved(percent: float | None) -> str:
    return MISSING if percent is None else f"{percent:.1f} %"


def _show_transfer(part: Document) -> str:
    return format_ms(transfer_ms(part["stats"])) if "stats" in part else MISSING


def _show_latency(key: str) -> Callable[[Document], str]:
    return lambda part: format_ms(part["latency_ms"][key])


def _show_bytes(key: str) -> Callable[[Document], str]:
    return lambda part: MISSING if part[key] is None else format_bytes(part[key])


def _show_logits(impact: Document) -> str:
    if impact["logits_bit_identical"]:
        return "bit-identical"
    return f"differ by {impact['max_abs_logit_difference']:.3g}"


_QUANTITIES: dict[str, Callable[[Document], str]] = {
    "latency, mean": _show_latency("mean"),
    "latency, median": _show_latency("median"),
    "latency, p95": _show_latency("p95"),
    "of it transfer": _show_transfer,
    "throughput": lambda part: f"{part['tokens_per_s']:,.0f} tokens/s",
    "peak fast memory": _show_bytes("peak_fast_memory_bytes"),
    "peak process memory": _show_bytes("peak_rss_bytes"),
    "moved per forward": _show_bytes("bytes_moved_per_forward"),
    "perplexity": lambda part: f"{part['perplexity']:.4f}",
}
_IMPACTS: dict[str, Callable[[Document], str]] = {
    "overhead with hooks": lambda impact: f"{impact['latency_overhead_pct']:+.1f} %",
    "fast memory saved": lambda impact: _show_saved(impact["memory_saved_pct"]),
    "logits": _show_logits,
}
_Row = tuple[str, str, str]
"""Name, value, note."""


def _workload_rows(document: Document) -> list[_Row]:
    placed = [f"{row.tier} {format_bytes(row.num_bytes)}" for row in tier_rows(document)]
    weights = f"{format_bytes(document['weight_bytes'])} in {document['num_blocks']} blocks"
    shape = f"{document['batch_size']} x {document['seq_length']} tokens"
    counts = f"{document['warmup']} warm-up and {document['num_iterations']} timed"
    torch = f"torch {document['versions']['torch']}"
    values = {
        "model": f"{document['model']} ({document['class']})",
        "weights": f"{weights}, {document['dtype']}",
        "placed": ", ".join(placed),
        "text": document["tokens_source"],
        "workload": f"forward passes over {shape}, {counts}",
        "machine": f"{document['device_name']}, {document['num_threads']} threads, {torch}",
    }
    return [(name, "", value) for name, value in values.items()]


def _baseline_rows(document: Document) -> list[_Row]:
    baseline = document["baseline"]
    if baseline is None:
        return [("not measured", "", "give --baseline")]
    drift: list[_Row] = []
    if baseline["drift_pct"] is not None:
        note = "median after the tiered run against before it"
        drift.append(("drift", f"{baseline['drift_pct']:+.1f} %", note))
    return _part_rows(document, baseline, after_latency=drift)


def _tiered_rows(document: Document) -> list[_Row]:
    tiered = document["tiered"]
    kind = {
        "measured": "waited for weights",
        "virtual clock": "charged, not waited",
        "emulated waits": "charged and waited",
    }[name_clock(document)]
    transfer: list[_Row] = [("of it transfer", _show_transfer(tiered), kind)]
    for row in tier_rows(document):
        if row.transfer_ms:
            plural = "s" if row.num_blocks > 1 else ""
            note = f"{row.num_blocks} block{plural}, {format_bytes(row.num_bytes)}"
            transfer.append((f"  from {row.tier}", format_ms(row.transfer_ms), note))
    if error := tiered["stats"]["wait_error"]:
        note = f"p95 {error['p95_us']:.2f} us, max {error['max_us']:.2f} us, n = {error['n']}"
        transfer.append(("error of a wait, mean", f"{error['mean_us']:.2f} us", note))
    return _part_rows(document, tiered, after_latency=transfer)


def _part_rows(document: Document, part: Document, *, after_latency: Sequence[_Row]) -> list[_Row]:
    really = document["mode"] == "real" or part is document["baseline"]
    notes = {
        "latency, mean": f"n = {part['latency_ms']['n']}, {document['warmup']} warm-up",
        "peak fast memory": document["fast_memory"],
        "peak process memory": "resident set (VmHWM)",
        "moved per forward": "weight bytes" if really else "weight bytes that tiers would move",
        "perplexity": f"{document['perplexity_tokens']} held-out tokens",
    }
    rows = [
        (name, show(part), notes.get(name, ""))
        for name, show in _QUANTITIES.items()
        if name != "of it transfer"
    ]
    return [*rows[:3], *after_latency, *rows[3:]]


def _impact_rows(document: Document) -> list[_Row]:
    impact = document["impact"]
    if impact is None:
        return [("not measured", "", "give --baseline")]
    difference = f"max difference {impact['max_abs_logit_difference']:.3g}"
    notes = {
        "overhead with hooks": "of medians" if is_steady(document) else drift_note(document),
        "fast memory saved": "" if document["mode"] == "real" else "emulation moves nothing",
        "logits": f"{difference} over {impact['logits_compared']:,} logits",
    }
    rows = [(name, show(impact), notes[name]) for name, show in _IMPACTS.items()]
    if charged_overhead_pct(document) is not None:
        rows.insert(0, ("charged by tiers", _show_charged(document), "of the baseline's median"))
    return [*rows, ("perplexity change", f"{impact['perplexity_delta']:+.6f}", "")]


def _quality_rows(document: Document) -> list[_Row]:
    quality, veto = document["quality"], document["quality"]["veto"]
    held = [f"{precision} {count}" for precision, count in quality["precisions"].items()]
    rows: list[_Row] = [("blocks held in", "", ", ".join(held))]
    if veto["epsilon_nats"] is not None:
        rows += [
            ("epsilon", f"{veto['epsilon_nats']:.5f} nats", "KL per token that may be lost"),
            ("KL, upper bound", f"{veto['bound_nats']:.5f} nats", "what the veto adds up"),
        ]
    if veto["predicted_nats"] is not None:
        rows.append(("KL, predicted", f"{veto['predicted_nats']:.5f} nats", ""))
    if (canary := quality.get("canary")) is not None:
        raised, count = canary["floors_raised"], len(canary["measured"])
        note = f"in {count} measurement{'s' * (count != 1)} of {canary['sequences']} sequences"
        rows.append(("floors raised", f"{raised} time{'s' * (raised != 1)}", note))
    measured, baseline = quality["measured"], document["baseline"]
    if measured is None:
        return [*rows, ("KL, measured", "", "give --baseline")]
    interval = measured["kl_interval"]
    spread = "" if interval is None else f"95 % {interval[0]:.5f} to {interval[1]:.5f}, "
    kl = f"{measured['kl_nats']:.5f} nats"
    rows.append(("KL, measured", kl, f"{spread}{measured['tokens']} held-out tokens"))
    perplexity = quality["perplexity"]
    if perplexity["predicted"] is not None:
        rows.append(("perplexity, predicted", f"{perplexity['predicted']:.4f}", ""))
    full = f"full model {baseline['perplexity']:.4f}"
    rows.append(("perplexity, measured", f"{perplexity['measured']:.4f}", full))
    agreement = f"{100 * measured['top1_agreement']:.2f} %"
    return [*rows, ("same most likely token", agreement, "of all positions")]


def _align(rows: Sequence[_Row]) -> str:
    """Lay out names, values aligned on the right, and notes after them."""
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    gap = "  " if values else ""
    return "\n".join(
        f"  {name.ljust(names)}  {value.rjust(values)}{gap}{note}".rstrip()
        for name, value, note in rows
    )
