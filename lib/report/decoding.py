"""Exact output beside plain streaming and the resident model, as a table.

The part ``exact`` of a benchmark document, which ``lib.evaluation.decoding`` measures.
"""

from collections.abc import Mapping
from typing import Any

from ..units import format_bytes

DECODING_HEADS = ("text", "tokens/s", "moved per token", "peak fast memory")
_WAYS = {
    "resident": "resident, no limit",
    "streamed": "streamed, lossless",
    "exact": "exact",
}


def decoding_rows(part: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each way that the texts were written."""
    return [_row(name, part[key]) for key, name in _WAYS.items() if part[key] is not None]


def decoding_notes(part: Mapping[str, Any]) -> list[str]:
    """Return what was written, what became of the drafts, and whether the texts are the same."""
    exact, against = part["exact"], "streamed" if part["resident"] is None else "resident"
    acceptance = "-" if exact["acceptance"] is None else f"{100 * exact['acceptance']:.1f} %"
    tokens = f"{part['sequences']} x {part['new_tokens']} new tokens"
    return [
        f"{tokens} behind {part['prompt_tokens']}, greedy, the second time of two",
        f"draft: {exact['precision']}, {exact['windows']} windows of {exact['mean_window']:.1f} "
        f"tokens on average, {acceptance} of those judged were accepted",
        f"{part['equal_tokens']} of {part['tokens']} tokens are the {against} model's",
    ]


def decoding_table(part: Mapping[str, Any]) -> str:
    """Return rows and notes as text."""
    rows = [DECODING_HEADS, *decoding_rows(part)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(DECODING_HEADS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *decoding_notes(part)])


def _row(name: str, way: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{way['tokens_per_s']:.1f}",
        format_bytes(way["bytes_moved_per_token"]),
        format_bytes(way["peak_weight_bytes"]),
    )
