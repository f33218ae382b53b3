"""What every command shares: one-line errors, exit codes, and how a result is given.

A result is a table for people and a JSON document. On a terminal stdout gets the table alone;
elsewhere the document follows it as the last line. ``--json FILE`` writes the document to a file,
``--json -`` gives it alone on stdout, and the table on stderr.

Exit codes: 0 done; 1 the run failed; 2 the input was wrong; 130 interrupted (Ctrl-C).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError, PlacementError
from ..files import check_writable, write_json

STDOUT = Path("-")
EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted. Where stdout is no terminal, "
    "the last line is the result as JSON."
)


class Parser(argparse.ArgumentParser):
    """A parser of flags whose errors are one line."""

    def __init__(self, description: str, *, epilog: str = "") -> None:
        super().__init__(description=description, epilog=f"{epilog} {EPILOG}".strip())

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with 2."""
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


def add_json_flag(parser: argparse._ActionsContainer) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json",
        type=_json_file,
        metavar="FILE",
        help="write the result as JSON to a file, or with - to stdout, instead of the table",
    )


def emit(table: str, document: Any, path: Path | None = None) -> None:
    """Give a result: its table, and its document where the flags and stdout want it."""
    print(table.rstrip("\n"), file=sys.stderr if path == STDOUT else sys.stdout, flush=True)
    emit_json(document, path)


def emit_json(document: Any, path: Path | None = None) -> None:
    """Give a result whose table is printed already."""
    if path is not None and path != STDOUT:
        write_json(document, path)
    if path == STDOUT or not sys.stdout.isatty():
        print(json.dumps(document, allow_nan=False), flush=True)


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's main and turn the errors a user can act on into one line and an exit code."""
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PlacementError, OSError, FloatingPointError) as error:
        print(f"failed: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which isn't imported for this
            raise
        print(f"failed: out of memory: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _json_file(name: str) -> Path:
    path = Path(name)
    try:
        if path != STDOUT:
            check_writable(path)
    except InputError as error:  # argparse would hide its text
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
