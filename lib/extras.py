"""Packages that not everybody needs: what to install where one is missing."""

import importlib.util

from .errors import InputError


def need_extra(extra: str, package: str) -> None:
    """Raise InputError, with the command that installs it, where a package isn't here."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"this needs {package}: pip install 'tierhints[{extra}]'")
