"""The smallest budget that a refusal names."""

import re
from typing import Any

import pytest
from torch import nn

from lib.errors import InputError
from lib.tiering import attach


def smallest(model: nn.Module, precision: str | None = None, **options: Any) -> str:
    """Return the least HBM budget, as the refusal of a smaller one names it."""
    with pytest.raises(InputError) as refusal:
        attach(model, budget={"HBM": 0, "SSD": None}, precision=precision, **options)
    return named(refusal.value)


def named(error: BaseException) -> str:
    """Return the budget that an error names as the smallest."""
    match = re.search(r"works is HBM=(\w+)", str(error))
    assert match is not None, error
    return match[1]
