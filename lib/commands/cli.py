"""What every command shares: exit codes and the closing JSON line.

Exit codes: 0 done; 1 the run failed; 2 the input was wrong (argparse uses 2 as well).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError, PlacementError
from ..files import write_json


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's main and turn the errors a user can act on into one line and an exit code."""
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
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
        return 1


def emit_json(document: Any, path: Path | None = None) -> None:
    """Print the result as the last line of stdout and, if a path is given, write it there too."""
    if path is not None:
        write_json(document, path)
    print(json.dumps(document, allow_nan=False), flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
