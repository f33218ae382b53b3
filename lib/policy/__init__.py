"""Decisions, pure: no torch, no device, no clock.

``planner`` makes a plan, ``timeline`` predicts its time, ``veto`` judges it and ``audit`` records
the answer, ``moves`` orders the changes from one plan to the next, ``states`` says which are
allowed.
"""

from .plan import BlockNeed, Placement, Plan, Step, definition_schedule
from .planner.planner import make_plan, smallest_budget
from .states import ALLOWED, Transition, placed_state
from .timeline import TimedUse, Timeline, Transfer, simulate

__all__ = [
    "ALLOWED",
    "BlockNeed",
    "Placement",
    "Plan",
    "Step",
    "Timeline",
    "Transfer",
    "Transition",
    "TimedUse",
    "definition_schedule",
    "make_plan",
    "placed_state",
    "simulate",
    "smallest_budget",
]
