"""Watch a running model from another terminal: tiers, states, bandwidth, hits, refusals.

    tierhints monitor budget.json
    tierhints monitor budget.json --budget 400MiB
    tierhints monitor budget.json --svg monitor.svg

The model's process has a controller with this control file (Runtime.control(file=)), or serves with
it (tierhints serve --control). The picture is that of its status, twice a second; elsewhere than on
a terminal it is given once.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..extras import need_extra
from ..files import parse_json, write_text
from ..tiering.control.file import status_path, write_request
from ..units import parse_bytes
from .cli import Parser, add_json_flag, check_outputs, emit, output_file

_REFRESH_SECONDS = 0.5
_ANSWER_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Show the status once, or until Ctrl-C; returns the exit code."""
    args = _parser().parse_args(argv)
    check_outputs({"--svg": args.svg, "--json": args.json})
    need_extra("monitor", "rich")
    size = None if args.budget in (None, "none") else args.budget
    if size is not None:
        parse_bytes(size)
    path = status_path(args.file)
    if not path.is_file():
        raise InputError(
            f"{path} isn't there: nobody watches {args.file}; start a controller with "
            "runtime.control(file=), or tierhints serve with --control"
        )
    if args.budget is not None:
        _ask(args.file, size)
    if sys.stdout.isatty() and not args.once and args.json is None and args.svg is None:
        return _watch(path)
    status = _read(path)
    from rich.console import Console

    from ..report.monitor import draw_status, render_svg

    if args.svg is not None:
        title = f"tierhints monitor {args.file.name}"
        write_text(render_svg(status, age_seconds=_age(path), title=title), args.svg)
    console = Console(width=100, no_color=True)
    with console.capture() as captured:
        console.print(draw_status(status, age_seconds=_age(path)))
    emit(captured.get(), status, args.json)
    return 1 if args.budget is not None and status["error"] else 0


def _watch(path: Path) -> int:
    from rich.live import Live

    from ..report.monitor import draw_status

    with Live(refresh_per_second=4, screen=False) as live:
        while path.is_file():
            live.update(draw_status(_read(path), age_seconds=_age(path)))
            time.sleep(_REFRESH_SECONDS)
    return 0


def _ask(file: Path, size: str | None) -> None:
    """Ask for a budget, and wait until there is an answer."""
    path = status_path(file)
    before = _read(path)["answers"]
    write_request(file, size)
    until = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < until:
        if _read(path)["answers"] > before:
            return
        time.sleep(0.05)
    raise InputError(f"nobody answers: is the model that watches {file} still running?")


def _read(path: Path) -> dict[str, Any]:
    status = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(status, dict) or not {"fast_bytes", "kv_bytes"} & status.keys():
        raise InputError(f"{path} is no controller's status: give the control file")
    return status


def _age(path: Path) -> float:
    return max(time.time() - path.stat().st_mtime, 0.0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Watch a running model: tiers, states, bandwidth, hits, refusals.")
    parser.add_argument("file", type=Path, metavar="FILE", help="its control file")
    parser.add_argument(
        "--budget", metavar="SIZE", help="ask for another budget of fast memory first, or for none"
    )
    parser.add_argument("--once", action="store_true", help="on a terminal, too: once")
    output = parser.add_argument_group("output")
    output.add_argument("--svg", type=output_file, metavar="FILE", help="write the picture, once")
    add_json_flag(output)
    return parser
