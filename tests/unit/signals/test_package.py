import subprocess
import sys
from pathlib import Path

import pytest

import lib.signals

ROOT = Path(__file__).parents[3]


def test_everything_in_all_is_importable() -> None:
    for name in lib.signals.__all__:
        assert getattr(lib.signals, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lib.signals.Nothing


def test_only_the_callback_needs_transformers() -> None:
    code = (
        "import sys, lib.signals; assert 'transformers' not in sys.modules;"
        "from lib.signals import TierHintsCallback; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
