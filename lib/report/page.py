"""report.html: one self-contained page of a run, with its pictures inside and nothing to fetch.

What the run's folder lacks is named on the page, with the command that makes it. Everything that
comes from a file is escaped.
"""

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..hints import Hints
from ..units import format_bytes
from .commands import run_commands
from .decoding import DECODING_HEADS, decoding_notes, decoding_rows
from .frontier import HEADS, frontier_rows
from .plots import tier_bytes
from .run import Run
from .style import PAGE_STYLE
from .tables import charged_overhead_pct, comparison_notes, comparison_rows, is_steady

CAPTIONS = {
    "frontier": (
        "What memory costs",
        "Each point is a run of the whole model, its weights held in another way. Ours gives every "
        "block the precision that the quality bound allows; uniform precision gives all the same.",
    ),
    "loss": (
        "Loss curve",
        "Training and held-out loss. The dashed line is the loss of the best model that ignores "
        "context; a model that learned something lies well below it.",
    ),
    "importance": (
        "Importance per block",
        "Signal per weight relative to the densest block, on a logarithmic scale. Hatched blocks "
        "have no signal (frozen in training).",
    ),
    "tiers": (
        "Tier map",
        "Each block is as wide as its bytes. Below, the blocks by importance: one goes to the tier "
        "in which its middle falls, between the thresholds.",
    ),
    "attention": (
        "Attention per head",
        "attention_fim_trace, the mean of 1 - sum of squared attention weights: low where a head "
        "looks at few positions. It says nothing about weights, and does not decide tiers.",
    ),
    "latency": (
        "Where a forward pass spends its time",
        "Mean of the timed passes. Compute is time inside blocks; the rest is what lies between "
        "them, such as attention masks, residual sums and the hooks themselves.",
    ),
    "memory": (
        "Weights in fast memory over time",
        "Bytes of the weights' storages while a few forward passes run. In real mode each spike is "
        "a block that came for its use and left again.",
    ),
    "stays": (
        "Blocks in time",
        "The last timed passes in real mode, a row for each block that moved, in the order in "
        "which they came: hatched from when it was asked for until it was there, full until "
        "its slot was given to another. Dotted lines are the ends of passes.",
    ),
}
_Facts = Mapping[str, Any]


def render_page(run: Run, pictures: Mapping[str, Path]) -> str:
    """Return the page; ``pictures`` maps names of CAPTIONS to the PNG files that there are."""
    name = run.directory.resolve().name
    figures = {key: _figure(key, path) for key, path in pictures.items()}
    sections = [
        _missing_section(run),
        _section("Frontier", [_frontier(run), *_pick(figures, "frontier")]),
        _section("Benchmark", [_benchmark(run), *_pick(figures, "latency", "memory", "stays")]),
        _section("Hints", [_hints(run), *_pick(figures, "importance", "tiers", "attention")]),
        _section("Training", [_training(run), *_pick(figures, "loss")]),
        _section("Make this again", [_commands(run)]),
        _section("Versions", [_facts(run.versions)]),
    ]
    body = "\n".join(filter(None, sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Tierhints: {escape(name)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<p class=kind>Tierhints report</p>\n<h1>{escape(name)}</h1>\n"
        f"<p class=lead>{escape(summarize(run))}</p>\n{_cards(run)}\n</header>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def summarize(run: Run) -> str:
    """Say in a few sentences what was trained, what it learned, and what tiering did."""
    sentences = []
    if run.model:
        kind = str(run.model.get("model_type", "model")).upper().replace("GPT2", "GPT-2")
        layers = run.model.get("n_layer", run.model.get("num_hidden_layers"))
        corpus = f" on {run.heldout['corpus']}" if "corpus" in run.heldout else ""
        sentences.append(f"A {kind} model with {layers} layers, trained{corpus}.")
    loss, entropy = run.heldout_loss, run.unigram_entropy
    if loss is not None and entropy is not None:
        verdict = "below" if loss < entropy else "NOT below"
        sentences.append(
            f"Its held-out loss is {loss:.3f} nats per token, {verdict} the unigram entropy of "
            f"{entropy:.3f}."
        )
    for document in run.benchmarks:
        if document["impact"]:
            sentences.append(_summarize_impact(document))
    return " ".join(sentences) or "The parts of this run that the report is about are missing."


def _summarize_impact(document: Mapping[str, Any]) -> str:
    impact = document["impact"]
    latency = f"{impact['latency_overhead_pct']:+.1f}\u00a0% latency"
    if not is_steady(document):
        latency += " (not reliable: the machine was busy)"
    same = impact["logits_bit_identical"]
    outputs = "bit-identical outputs" if same else "outputs that DIFFER from the untouched model's"
    charged = charged_overhead_pct(document)
    if charged is not None:
        return (
            f"Emulated tiers charge {charged:+.1f}\u00a0% of the untouched model's latency, with "
            f"{outputs}; measured, the hooks' own time included, it is {latency}."
        )
    if document["mode"] == "emulated":
        return f"Emulated tiers cost {latency}, with {outputs}."
    saved = f"{impact['memory_saved_pct']:.1f}\u00a0% less fast memory"
    return f"Real offload needs {saved} at {latency}, with {outputs}."


def _cards(run: Run) -> str:
    """Show the few numbers that a reader came for."""
    cards: list[tuple[str, str]] = []
    if run.heldout_loss is not None:
        entropy = run.unigram_entropy
        against = "" if entropy is None else f", unigram {entropy:.2f}"
        cards.append((f"{run.heldout_loss:.2f}", f"held-out loss, nats per token{against}"))
    if run.benchmarks:
        document = run.benchmarks[0]
        label = f"weights in {document['num_blocks']} blocks, {document['dtype']}"
        cards.append((format_bytes(document["weight_bytes"]), label))
    for document in run.benchmarks:
        impact, mode = document["impact"], document["mode"]
        if impact:
            sure = "" if is_steady(document) else ", not reliable"
            charged = charged_overhead_pct(document)
            if charged is not None:
                cards.append((f"{charged:+.1f} %", f"latency, charged by {mode} tiers"))
            label = f"latency with hooks, {mode} tiering{sure}"
            cards.append((f"{impact['latency_overhead_pct']:+.1f} %", label))
            if mode == "real":
                saved = f"{impact['memory_saved_pct']:.1f} %"
                cards.append((saved, "of fast memory saved, real tiering"))
    items = "".join(
        f"<li><b>{escape(value)}</b> <span>{escape(label)}</span></li>" for value, label in cards
    )
    return f"<ul class=cards>{items}</ul>" if items else ""


def _missing_section(run: Run) -> str:
    if not run.missing:
        return ""
    items = ""
    for missing in run.missing:
        command = f"<pre>{escape(missing.command)}</pre>" if missing.command else ""
        items += f"<li><b>{escape(missing.part)}</b>: {escape(missing.problem)}.{command}</li>"
    return f"<section class=missing><h2>Missing from this report</h2><ul>{items}</ul></section>"


def _frontier(run: Run) -> str:
    return _table(HEADS, frontier_rows(run.frontier)) if run.frontier else ""


def _benchmark(run: Run) -> str:
    if not run.benchmarks:
        return ""
    names, clocks, *rows = comparison_rows(run.benchmarks)
    heads = [f"{name}\n{clock}" for name, clock in zip(names, clocks, strict=True)]
    notes = comparison_notes(run.benchmarks)
    if any(document["mode"] == "emulated" for document in run.benchmarks):
        notes.append(
            "emulated times say what hypothetical tiers would cost, not what this machine's do"
        )
    source = run.benchmarks[0]["tokens_source"]
    notes.append(f"text: {source}, {run.benchmarks[0]['perplexity_tokens']} tokens for perplexity")
    page = _table(heads, rows) + _list(notes)
    for part in filter(None, (document.get("exact") for document in run.benchmarks)):
        page += _table(DECODING_HEADS, decoding_rows(part)) + _list(decoding_notes(part))
    return page


def _hints(run: Run) -> str:
    hints = run.hints
    if hints is None:
        return ""
    facts: dict[str, Any] = dict(hints.provenance)
    if hints.model is not None:
        facts = {"made for": hints.model.id, "model digest": hints.model.parameter_digest} | facts
    sums = tier_bytes(hints)
    total = sum(sums.values())
    rows = []
    for tier, num_bytes in sums.items():
        count = sum(hint.tier is tier for hint in hints.blocks.values())
        rows.append([str(tier), str(count), format_bytes(num_bytes), f"{num_bytes / total:.1%}"])
    table = _table(["tier", "blocks", "weight bytes", "share"], rows) if rows else ""
    return _signal(hints) + table + _details("Provenance", _facts(facts)) + _blocks(hints)


def _signal(hints: Hints) -> str:
    """Say in a sentence where importance comes from and how it became tiers."""
    if hints.model is None:
        return "<p>Flat hints: a tier for each block, made by hand or by another tool.</p>"
    provenance = hints.provenance
    known = {"step": "step", "tokens_per_update": "tokens per update", "tokens": "tokens"}
    details = [
        f"{label} {_show(provenance[key])}" for key, label in known.items() if key in provenance
    ]
    signal = ", ".join([str(provenance.get("signal", "unknown")), *details])
    sentence = f"Importance is from the signal {signal}"
    thresholds = provenance.get("thresholds")
    if thresholds:
        hbm, cpu = thresholds["hbm"], thresholds["cpu"]
        sentence += (
            f"; blocks fill HBM to {hbm:.0%} of the weight bytes, CPU to {cpu:.0%}, SSD the rest, "
            "most important first"
        )
    return f"<p>{escape(sentence)}.</p>"


def _blocks(hints: Hints) -> str:
    """List every block, most important first, folded away."""
    unranked = len(hints.blocks) + 1
    ordered = sorted(hints.blocks.items(), key=lambda item: item[1].rank or unranked)
    rows = []
    for name, hint in ordered:
        importance = "-" if hint.importance is None else f"{hint.importance:.3g}"
        size = "-" if hint.num_bytes is None else format_bytes(hint.num_bytes)
        rows.append([str(hint.rank or "-"), name, str(hint.tier), importance, size, hint.reason])
    heads = ["rank", "block", "tier", "importance", "bytes", "reason"]
    return _details(f"All {len(rows)} blocks", _table(heads, rows, numbers=False))


def _training(run: Run) -> str:
    facts: dict[str, Any] = {}
    if run.metrics:
        facts["optimizer steps"] = run.metrics[-1]["step"]
    if run.heldout:
        facts["corpus"] = run.heldout.get("corpus")
    if run.heldout_loss is not None:
        facts["held-out loss"] = f"{run.heldout_loss:.4f} nats per token"
    if run.unigram_entropy is not None:
        facts["unigram entropy"] = f"{run.unigram_entropy:.4f} nats per token"
    settings: dict[str, Any] = {}
    for group in ("run", "model", "data", "train"):
        values = run.config.get(group)
        if isinstance(values, Mapping):
            settings |= {f"{group}: {name.replace('_', ' ')}": values[name] for name in values}
    return _facts(facts) + (_details("Settings", _facts(settings)) if settings else "")


def _commands(run: Run) -> str:
    """Return the commands behind this page."""
    lines = "\n".join(escape(shlex.join(command)) for command in run_commands(run))
    return f"<p>From the root of the repository:</p><pre>{lines}</pre>"


def _pick(figures: Mapping[str, str], *keys: str) -> list[str]:
    return [figures[key] for key in keys if key in figures]


def _figure(key: str, path: Path) -> str:
    title, text = CAPTIONS[key]
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure id="{key}"><div class=scroll>'
        f'<img alt="{escape(title)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption><b>{escape(title)}.</b> {escape(text)}</figcaption></figure>"
    )


def _section(title: str, parts: Iterable[str]) -> str:
    content = "\n".join(filter(None, parts))
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _facts(facts: _Facts) -> str:
    if not facts:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{escape(str(name))}</th><td>{escape(_show(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<div class=scroll><table class=facts>{rows}</table></div>"


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_show(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_show(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value in (None, "") else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """Return a table that scrolls sideways by itself; ``numbers`` sets all columns but the first
    to the right. A line break in a head starts its small print.
    """
    kinds = ["", *[" class=n" if numbers else ""] * (len(heads) - 1)]
    head = ""
    for kind, text in zip(kinds, heads, strict=True):
        name, _, small = text.partition("\n")
        extra = f"<br><small>{escape(small)}</small>" if small else ""
        head += f"<th scope=col{kind}>{escape(name)}{extra}</th>"
    body = ""
    for row in rows:
        cells = zip(kinds, row, strict=True)
        body += f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for kind, cell in cells)}</tr>"
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _list(items: Iterable[str]) -> str:
    return f"<ul class=notes>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
