"""Tierhints: training signals turned into where, and how precisely, inference keeps weights.

Every folder and file here is a room; docs/architecture.md says what lives in which. Imports go
downwards only, in the order that ``tests/unit/test_imports.py`` holds.
"""
