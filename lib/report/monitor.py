"""What a running model does, as a picture in a terminal: tiers, states, bandwidth, hits, refusals.

It is drawn from the status that a controller, or a server, writes beside its control file
(``tiering.control.file``), so the model may run in another process.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..units import format_bytes
from ..vocabulary import State

_WIDTH = 30
_SVG_COLUMNS = 100
_FONT_FACES = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)
"""Where rich's pictures would fetch a font."""
_MEANINGS = {
    State.FULL: "full, in fast memory",
    State.REDUCED: "reduced, in fast memory",
    State.COMPRESSED: "compressed, in fast memory",
    State.STAGED: "in host memory",
    State.COLD: "on storage",
    State.IN_FLIGHT: "on the way",
    State.RECOMPUTABLE: "tied copy, held nowhere",
}


def draw_status(status: Mapping[str, Any], *, age_seconds: float) -> RenderableType:
    """Return one picture of a status; ``age_seconds``: how old it is."""
    title = "tierhints" if age_seconds < 2 else f"tierhints, last heard {age_seconds:.0f} s ago"
    if "kv_budget" in status:
        parts: list[RenderableType] = [_served(status)]
    else:
        parts = [_budget(status), _states(status), _speed(status)]
    if status.get("error"):
        parts.append(Text(f"refused: {status['error']}", style="red"))
    return Panel(Group(*parts), title=title, title_align="left")


def _served(status: Mapping[str, Any]) -> RenderableType:
    """Draw what keys and values take, and what an engine does and did."""
    table = Table.grid(padding=(0, 2))
    limit, held = status["kv_budget"], status["kv_bytes"]
    said = f"{format_bytes(held)} of {format_bytes(limit)}"
    table.add_row("keys and values", Bar(max(limit, held), 0, held, width=_WIDTH), said)
    table.add_row("requests", f"{status['running']} running, {status['waiting']} waiting")
    for name in ("finished", "cancelled", "failed", "escalations", "step_downs", "evictions"):
        table.add_row(name.replace("_", " "), str(status[name]))
    return table


def render_svg(status: Mapping[str, Any], *, age_seconds: float, title: str) -> str:
    """Return the picture as SVG, which fetches nothing."""
    console = Console(record=True, width=_SVG_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(draw_status(status, age_seconds=age_seconds))
    picture = _FONT_FACES.sub("", console.export_svg(title=title, unique_id="monitor"))
    return picture.replace("Fira Code, monospace", "monospace") + "\n"


def _budget(status: Mapping[str, Any]) -> RenderableType:
    """Draw what is taken of each tier; fast memory beside its limit."""
    table = Table.grid(padding=(0, 2))
    limit, fast = status["limit_bytes"], status["fast_bytes"]
    total = max(limit or 0, fast, *status["bytes_per_tier"].values(), 1)
    said = "no limit" if limit is None else f"of {format_bytes(limit)}"
    if status["asked_bytes"] != limit:
        asked = status["asked_bytes"]
        more = "no limit" if asked is None else format_bytes(asked)
        said += f" (may grow to {more} after the dwell)"
    table.add_row("fast memory", Bar(total, 0, fast, width=_WIDTH), f"{format_bytes(fast)} {said}")
    for tier, size in status["bytes_per_tier"].items():
        label = "weights in HBM" if tier == "HBM" else f"weights in {tier}"
        table.add_row(label, Bar(total, 0, size, width=_WIDTH), format_bytes(size))
    return table


def _states(status: Mapping[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for state, count in status["states"].items():
        table.add_row(state, f"{count:4d} blocks", _MEANINGS[State(state)])
    return Group(Text(), table)


def _speed(status: Mapping[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    sample = status.get("sample")
    if sample is not None and sample["seconds"] > 0:
        seconds = sample["seconds"]
        table.add_row("forwards", f"{sample['forwards'] / seconds:.1f} /s")
        table.add_row("bandwidth", f"{format_bytes(round(sample['bytes_moved'] / seconds))}/s")
        table.add_row("waited for weights", f"{sample['waited_seconds'] / seconds:.0%} of the time")
        hits = sample["hit_share"]
        table.add_row("resident hits", "-" if hits is None else f"{hits:.1%} of the bytes")
        if uses := sample["expert_uses"]:
            shares = (sample[f"experts_{each}"] / uses for each in ("resident", "ready"))
            table.add_row("experts", "{:.1%} resident, {:.1%} ready".format(*shares))
        table.add_row("on the way", str(sample["queue_depth"]))
        worst = ", ".join(name for name, _ in sample["waited_for"][:3])
        table.add_row("waited for most", worst or "-")
        system = sample["system"]
        if system is not None:
            free = f"{format_bytes(system['free_bytes'])} free ({system['source']})"
            share = system["waited_share"]
            pressed = "" if share is None else f", pressure {share:.0%}"
            table.add_row("system memory", free + pressed)
    table.add_row("changes", str(status["changes"]))
    last = status["last_change"]
    if last is not None:
        took = (last["ended_at"] - last["asked_at"]) * 1e3
        moved = f"{len(last['demoted'])} left, {len(last['promoted'])} came"
        table.add_row("last change", f"{moved}, {took:.0f} ms: {last['reason']}")
    table.add_row("refused by the veto", str(status["refusals"]))
    return Group(Text(), table)
