"""Measuring a whole model: calibration, oracle, canary, timed passes. Formulas of quality are in
``precision``.
"""
