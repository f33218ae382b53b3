"""What a generation cost, in one line."""

from collections.abc import Mapping
from typing import Any

from ..units import format_bytes, format_seconds


def closing_line(document: Mapping[str, Any]) -> str:
    """Return speed, memory, bytes moved and the bound of what ``tierhints generate`` wrote."""
    first, rate = document["first_token_seconds"], document["tokens_per_second"]
    count = document["new_tokens"]
    speed = f"{count} token{'' if count == 1 else 's'}"
    if document["interrupted"]:
        speed = f"interrupted after {speed}"
    if rate is not None:
        speed += f" at {rate:.3g} tokens/s"
    if first is not None:
        speed += f", the first after {format_seconds(first)}"
    loaded = format_seconds(document["load_seconds"])
    limit = document["budget_bytes"]
    of = "(no limit)" if limit is None else f"of {format_bytes(limit)}"
    parts = [
        f"{speed} (loaded in {loaded})",
        f"fast memory {format_bytes(document['peak_weight_bytes'])} {of}",
    ]
    if document["bytes_per_token"] is not None:
        parts.append(f"{format_bytes(document['bytes_per_token'])} moved per token")
    if (experts := document.get("experts")) and experts["uses"]:
        parts.append(f"{experts['ready'] / experts['uses']:.0%} of its experts there when needed")
    parts.append(describe_bound(document))
    return "; ".join(parts)


def describe_bound(document: Mapping[str, Any]) -> str:
    """Say what the model that ran may differ by from the full one, and who says so."""
    if (drafting := document["drafting"]) is not None:
        passes = f"{drafting['windows']} window{'' if drafting['windows'] == 1 else 's'}"
        return (
            f"exact: the full model's own text, {drafting['accepted']} of {drafting['drafted']} "
            f"drafted tokens accepted in {passes}"
        )
    if document["lossless"]:
        return "lossless: bit for bit"
    predicted = document["predicted_nats"]
    said = "" if predicted is None else f"predicted {predicted:.3g}"
    if document["epsilon_nats"] is not None:
        return (
            f"KL at most {document['bound_nats']:.3g} nats per token (epsilon "
            f"{document['epsilon_nats']:.3g}, {said})"
        )
    held = document["precisions"]
    only = next(iter(held)) + " everywhere" if len(held) == 1 else ""
    blocks = only or ", ".join(f"{name} in {count} blocks" for name, count in held.items())
    return f"no bound: {blocks}" + (f", KL {said} nats per token" if said else "")
