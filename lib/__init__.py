"""Tierhints: training signals turned into where, and how precisely, inference keeps weights.

Every folder and file here is a room; docs/architecture.md says what lives in which. Imports go
downwards only, in the order that ``tests/unit/test_imports.py`` holds.
"""

if __name__ == "lib":  # by the folder's name, in a checkout: the package is tierhints all the same
    import sys
    from pathlib import Path

    from .alias import alias_package

    del sys.modules["lib.alias"]  # from now on it is that of tierhints
    alias_package(__name__, Path(__file__).parent)
