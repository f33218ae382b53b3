"""Tests that interrupt the process: each runs in one of its own, which may hang or die."""

import os
import subprocess
import sys
from pathlib import Path


def run_apart(test_file: str, call: str, *, seconds: float) -> None:
    """Run a function of a test module, as ``name(arguments)``, in a process of its own; it has to
    end well in time.
    """
    module, root = Path(test_file), Path(__file__).parents[1]
    paths = [str(module.parent), str(root), str(root / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import {module.stem} as t; t.{call}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=root,
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
