"""Experiments with the closed loop: a budget that changes while a model runs, and how many bytes a
cycle has to move.
"""
