"""Tierhints: training signals turned into where, and how precisely, inference keeps weights.

Imports go downwards: errors, config, units, blocks -> hints -> signals -> precision -> policy ->
tiering -> progressive -> export, report. ``tests/unit/test_imports.py`` enforces it.
"""
