"""Decisions, pure: what a pass costs in time, and which block is kept where."""

from ..vocabulary import State
from .plan import BlockNeed, Placement, Plan, Step, definition_schedule
from .planner.planner import make_plan, smallest_budget
from .states import ALLOWED, Transition, find_path, placed_state
from .timeline import PassTime, TimedUse, Timeline, Transfer, simulate

__all__ = [
    "ALLOWED",
    "BlockNeed",
    "PassTime",
    "Placement",
    "Plan",
    "State",
    "Step",
    "Timeline",
    "Transfer",
    "Transition",
    "TimedUse",
    "definition_schedule",
    "find_path",
    "make_plan",
    "placed_state",
    "simulate",
    "smallest_budget",
]
