"""Which experts of a mixture stay in fast memory: pure decisions, on a clock of their own.

``cache`` is what the engine and the simulator both run: ``residents`` keeps order, ``values`` says
what an expert is worth, ``choice`` which half-life suits.
"""

from .cache import POLICIES, Counters, ExpertCache
from .residents import Admission, Expert

__all__ = ["POLICIES", "Admission", "Counters", "Expert", "ExpertCache"]
