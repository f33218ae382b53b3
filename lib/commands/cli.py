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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError, PlacementError
from ..files import check_writable, write_json

STDOUT = Path("-")
_REPLACED = {
    code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}
"""What ``printable`` replaces: C0, DEL and C1."""
EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted. Where stdout is no terminal, "
    "the last line is the result as JSON."
)


class Parser(argparse.ArgumentParser):
    """A parser of flags whose errors are one line."""

    def __init__(self, description: str, *, epilog: str = "") -> None:
        super().__init__(description=description, epilog=f"{epilog} {EPILOG}".strip())

    def error(self, message: str) -> NoReturn:
        """Raise InputError, which ``run_main`` prints."""
        raise InputError(f"{message} ({self.prog} --help)")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse, and check the ``output_file`` flags: each is writable and a file of its own, which
        no other flag names. Raises InputError.
        """
        parsed = super().parse_args(args, namespace)
        named = {
            "/".join(action.option_strings) or action.dest: (action, getattr(parsed, action.dest))
            for action in self._actions
            if isinstance(getattr(parsed, action.dest, None), Path)
        }
        check_outputs(
            {flag: path for flag, (action, path) in named.items() if action.type is output_file},
            beside={flag: path for flag, (_, path) in named.items()},
        )
        return parsed


def output_file(name: str) -> Path:
    """Read a flag that names a file to write: its ``type``, by which ``Parser`` knows it."""
    return Path(name)


def check_outputs(
    outputs: Mapping[str, Path | None], *, beside: Mapping[str, Path | None] | None = None
) -> None:
    """Refuse, before the work starts, an output file that can't be written, and one that another
    flag names too, among the outputs and ``beside`` them: one would replace the other.

    Both are flag -> path; raises InputError.
    """
    every = {**outputs, **(beside or {})}
    for flag, path in outputs.items():
        if path is None or path == STDOUT:
            continue
        check_writable(path)
        for other, file in every.items():
            if other != flag and file is not None and file.resolve() == path.resolve():
                raise InputError(f"{flag} {path} is the file of {other}, too: give another")


def add_json_flag(parser: argparse._ActionsContainer) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json",
        type=output_file,
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


def printable(text: str) -> str:
    """Return a text as a terminal may show it: control characters, which would move its cursor or
    change its settings, are replaced. Line ends and tabs stay.
    """
    return text.translate(_REPLACED)


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's main and turn the errors a user can act on into one line and an exit code."""
    if sys.stdout is None:  # closed by whoever started this: print would lose the result silently
        print("failed: stdout is closed, and the result goes there: open it", file=sys.stderr)
        return 1
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
