"""The closed loop around a runtime: what is observed, a budget that changes while the model runs,
and the log of both. What is decided, and why, is in ``policy/control``.
"""
