"""tier_hints.json: what the file says, how it is made, loaded, checked and matched with a model's
blocks.

The file is intent: for each block its importance, its precision floor where one is known, and the
tier it deserves. It names no device and no bandwidth. No torch here. The flat form
``{"transformer.h.0.attn": "HBM"}`` is read as well.
"""

from .building import assign_tiers, build_hints, rank_blocks
from .document import (
    hints_from_json,
    hints_to_json,
    load_hints,
    save_hints,
)
from .matching import Identify, match_hints, shorten_digest
from .records import BlockHint, Hints, ModelInfo

__all__ = [
    "BlockHint",
    "Hints",
    "Identify",
    "ModelInfo",
    "assign_tiers",
    "build_hints",
    "hints_from_json",
    "hints_to_json",
    "load_hints",
    "match_hints",
    "rank_blocks",
    "save_hints",
    "shorten_digest",
]
