"""The README's commands, run in order in a fresh clone, as somebody new would. Takes half an hour:
it installs, trains, downloads a model from the package index, and runs the checks.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_commands_of_the_readme_work_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    blocks = re.findall(r"```sh\n(.*?)```", (clone / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    script = "set -euxo pipefail\n" + "\n".join(blocks)
    outside = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    assert (clone / "runs" / "quickstart" / "frontier.png").exists()
