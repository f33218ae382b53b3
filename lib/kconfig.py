"""Strict evaluation of Kconfig files and configuration files, on top of Kconfiglib.

Kconfiglib only warns of a mistake and lets the default win. Here every warning, and every line that
had no effect, is an InputError that names file and line. The symbols themselves are
known to ``config`` alone.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import InputError
from .extras import need_extra
from .units import parse_number

ROOT = Path(__file__).resolve().parent.parent
"""The repository: the folder of the root Kconfig."""

Option = TypeVar("Option")


class Assignment(NamedTuple):
    """A line of a configuration file: ``CONFIG_NAME=value``, or that NAME is not set (n)."""

    name: str
    value: str  # as written: y, n, 12, "text"
    where: str  # path:line

    def __str__(self) -> str:
        """Place and line, for error messages."""
        return f"{self.where}: CONFIG_{self.name}={self.value}"


def open_kconfig(path: Path | str = ROOT / "Kconfig") -> Any:
    """Parse the Kconfig files; returns a ``kconfiglib.Kconfig`` with all symbols at defaults.

    Raises InputError where they or kconfiglib are missing: both come with a checkout's
    environment, not with the package.
    """
    need_extra("dev", "kconfiglib")
    import kconfiglib

    # The absolute path, and rsource in the files, make this independent of the current folder and
    # of a $srctree that belongs to a kernel.
    try:
        kconf = kconfiglib.Kconfig(str(Path(path).absolute()), warn_to_stderr=False)
    except kconfiglib.KconfigError as error:
        raise InputError(str(error)) from error
    kconf.warn_assign_undef = True
    # read_assignments finds what one file sets twice; a fragment may override an earlier file.
    kconf.warn_assign_override = kconf.warn_assign_redun = False
    _raise_warning(kconf)
    return kconf


def read_assignments(path: Path | str) -> dict[str, Assignment]:
    """Read a configuration file without evaluating it; raises InputError on a malformed line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"no configuration {path}: run make <preset>_defconfig (see make listdefconfigs) "
            f"or make menuconfig"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"configuration {path} can't be read: {error}") from None
    assignments: dict[str, Assignment] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if match := re.fullmatch(r"CONFIG_(\w+)=(\S|\S.*\S)\s*", line):
            assignment = Assignment(match[1], match[2], where)
        elif match := re.fullmatch(r"# CONFIG_(\w+) is not set\s*", line):
            assignment = Assignment(match[1], "n", where)
        elif not line.strip() or line.lstrip().startswith("#"):
            continue
        else:
            raise InputError(
                f"{where}: malformed line {line!r}: write CONFIG_NAME=value, without spaces round "
                f"the '='"
            )
        if earlier := assignments.get(assignment.name):
            raise InputError(f"{assignment}: already set at {earlier.where}; remove one of the two")
        assignments[assignment.name] = assignment
    return assignments


def load_assignments(
    kconf: Any, path: Path | str, *, replace: bool = True
) -> dict[str, Assignment]:
    """Load a configuration file, in place of or over what was loaded before; raises InputError."""
    import kconfiglib

    assignments = read_assignments(path)
    for assignment in assignments.values():
        symbol = kconf.syms.get(assignment.name)
        if symbol is None or not symbol.nodes:
            close = difflib.get_close_matches(assignment.name, kconf.syms, n=1)
            hint = f"; did you mean CONFIG_{close[0]}?" if close else ""
            raise InputError(
                f"{assignment}: unknown symbol{hint} (make olddefconfig drops unknown symbols)"
            )
        pattern, form = {
            kconfiglib.BOOL: ("y|n", "y or n"),
            kconfiglib.INT: (r"-?\d+", "a whole number"),
            kconfiglib.STRING: (r'"(\\.|[^"\\])*"', "text in double quotes"),
        }[symbol.orig_type]
        if not re.fullmatch(pattern, assignment.value):
            raise InputError(f"{assignment}: the value must be {form}")
    kconf.load_config(str(path), replace=replace)
    _raise_warning(kconf)
    return assignments


def check_effective(kconf: Any, assignments: Mapping[str, Assignment]) -> None:
    """Raise InputError for an assignment that did not take, naming the reason."""
    import kconfiglib

    for assignment in assignments.values():
        symbol = kconf.syms[assignment.name]
        is_bool = symbol.orig_type == kconfiglib.BOOL
        effective = symbol.tri_value if is_bool else symbol.str_value
        if effective == symbol.user_value:
            continue
        if symbol.choice and symbol.choice.selection and assignment.value == "y":
            reason = f"{symbol.choice.selection.name} is chosen instead, and one of them can be y"
        elif symbol.choice and symbol.choice.selection:
            reason = "one of its choice must be y, and this is the default"
        elif not kconfiglib.expr_value(needs := (symbol.choice or symbol).direct_dep):
            reason = (
                f"it needs {kconfiglib.expr_str(needs)}; drop the line, or run make olddefconfig"
            )
        elif allowed := _active_range(symbol):
            reason = f"it is out of range, allowed are {allowed[0]} to {allowed[1]}"
        else:
            reason = f"its value is {symbol.str_value}"
        raise InputError(f"{assignment} has no effect: {reason}")
    for symbol in kconf.unique_defined_syms:
        _ = symbol.str_value  # evaluates, and warns of a default that is out of range
    _raise_warning(kconf)


class Symbols:
    """Evaluated symbols as Python values; ``read`` holds the names that were asked for."""

    def __init__(self, kconf: Any, path: Path | str, assignments: Mapping[str, Assignment]) -> None:
        """Wrap what was loaded; path and assignments are for error messages."""
        self.read: set[str] = set()
        self._kconf = kconf
        self._path = path
        self._assignments = assignments

    def label(self, name: str) -> str:
        """Say where a symbol was set: ``path:line: CONFIG_NAME``; no line if it was not."""
        assignment = self._assignments.get(name)
        return f"{assignment.where if assignment else self._path}: CONFIG_{name}"

    def text(self, name: str) -> str:
        """Return a symbol's value; where its dependencies are off, the default of its entry."""
        import kconfiglib

        self.read.add(name)
        symbol = self._kconf.syms[name]
        is_bool = symbol.orig_type == kconfiglib.BOOL
        if not is_bool and not kconfiglib.expr_value(symbol.direct_dep):
            for default, condition in symbol.orig_defaults:
                if kconfiglib.expr_value(condition):
                    return str(default.str_value)
        return str(symbol.str_value)

    def integer(self, name: str) -> int:
        """Return an int symbol; Kconfig has checked its range."""
        return int(self.text(name))

    def flag(self, name: str) -> bool:
        """Return a bool symbol; it is off where its dependencies are."""
        return self.text(name) == "y"

    def number(self, name: str, interval: str, *, example: str) -> float:
        """Parse a string symbol that holds a number."""
        return parse_number(
            self.text(name), name=self.label(name), interval=interval, example=example
        )

    def option(self, options: Mapping[str, Option]) -> Option:
        """Return what stands for the chosen symbol of a choice; ``options`` are all its symbols."""
        self.read.update(options)
        symbols = [self._kconf.syms[name] for name in options]
        choice = symbols[0].choice
        assert set(choice.syms) == set(symbols), f"the choice has {choice.syms}"
        chosen = choice.selection or choice.orig_defaults[0][0]
        return options[chosen.name]


def _active_range(symbol: Any) -> tuple[str, str] | None:
    import kconfiglib

    for low, high, condition in symbol.ranges:
        if kconfiglib.expr_value(condition):
            return low.str_value, high.str_value
    return None


def _raise_warning(kconf: Any) -> None:
    if kconf.warnings:
        raise InputError(kconf.warnings[0].replace("warning: ", "").strip())
