"""Make a run's report.html: one self-contained page with its pictures, facts and benchmark.

    tierhints report runs/quickstart

The pictures are left in the run's folder too. A part of the run that is missing is named on the
page, with the command that makes it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError
from ..files import write_text
from ..report.benchmark_plots import plot_latency, plot_memory, plot_stays
from ..report.frontier import plot_frontier
from ..report.page import render_page
from ..report.plots import attention_traces, plot_attention, plot_importance, plot_loss, plot_tiers
from ..report.run import Missing, Run, load_run
from .cli import Parser, add_json_flag, check_outputs, emit, output_file


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and write the report; returns the exit code."""
    args = _parser().parse_args(argv)
    output = args.output or args.run / "report.html"
    run = load_run(args.run)
    check_outputs({"--output": output, "--json": args.json})
    pictures = draw_pictures(run)
    write_text(render_page(run, pictures), output)
    for missing in run.missing:
        print(f"missing: {missing.part}: {missing.problem}", file=sys.stderr)
    document = {
        "report": str(output),
        "pictures": {name: str(path) for name, path in pictures.items()},
        "heldout_loss_nats": run.heldout_loss,
        "unigram_entropy_nats": run.unigram_entropy,
        "missing": [missing.part for missing in run.missing],
    }
    emit(f"report: {output}", document, args.json)
    return 0


def draw_pictures(run: Run) -> dict[str, Path]:
    """Draw what the run has data for; what a picture lacks is added to what the run is missing."""
    settings = run.config.get("report") or {}
    style = {"dpi": settings["dpi"]} if "dpi" in settings else {}
    wanted: dict[str, Callable[[Path], None]] = {}
    if run.metrics:
        metrics = run.directory / "metrics.jsonl"
        wanted["loss"] = lambda path: plot_loss(metrics, path, run.unigram_entropy, **style)
    if (hints := run.hints) is not None:
        wanted["importance"] = lambda path: plot_importance(hints, path, **style)
        wanted["tiers"] = lambda path: plot_tiers(hints, path, **style)
        if attention_traces(hints):
            wanted["attention"] = lambda path: plot_attention(hints, path, **style)
    if run.benchmarks:
        wanted["latency"] = lambda path: plot_latency(run.benchmarks, path, **style)
        # Emulation moves nothing: its flat line is drawn only where there is no other.
        moving = [document for document in run.benchmarks if document["mode"] == "real"]
        wanted["memory"] = lambda path: plot_memory(moving or run.benchmarks, path, **style)
        if any((each["tiered"].get("in_slots") or {}).get("stays") for each in moving):
            wanted["stays"] = lambda path: plot_stays(moving, path, **style)
    if run.frontier:
        wanted["frontier"] = lambda path: plot_frontier(run.frontier, path, **style)
    pictures = {}
    for name, draw in wanted.items():
        path = run.directory / f"{name}.png"
        try:
            draw(path)
        except InputError as error:
            run.missing.append(Missing(part=f"picture of {name}", problem=str(error), command=""))
        else:
            pictures[name] = path
    return pictures


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Write a run's report.html: one page with plots, facts and benchmark.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run: runs/<name>")
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="page to write (default: RUN_DIR/report.html)",
    )
    add_json_flag(parser)
    return parser
