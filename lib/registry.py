"""What may be added from outside: classes by name, and the plugins that add them.

A registry holds one kind (stores, kernels, signals, the benchmark's systems); docs/extending.md
has an example of each. Whoever looks something up first gets the modules that
``$TIERHINTS_PLUGINS`` names imported: registering is all that they need to do.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from .errors import InputError

PLUGINS_VARIABLE = "TIERHINTS_PLUGINS"
"""Names of modules, with commas between them, that the environment asks for."""
_imported: set[str] = set()

Item = TypeVar("Item")


class Registry(Generic[Item]):
    """Items of one kind by name, in the order in which they were registered."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, Item] = {}

    def add(self, name: str, item: Item) -> None:
        """Register an item. Raises InputError for a name that another one has; the same definition
        run again (a notebook's cell, a reloaded module) takes the place of its former self.
        """
        before = self._items.get(name)
        if before is not None and _definition(before) != _definition(item):
            raise InputError(
                f"{self.kind} '{name}' is registered already ({'.'.join(_definition(before))}): "
                "choose another name"
            )
        self._items[name] = item

    def __getitem__(self, name: str) -> Item:
        import_plugins()
        if name not in self._items:
            raise InputError(
                f"no {self.kind} '{name}'; there are: {', '.join(self._items)} "
                f"(${PLUGINS_VARIABLE} names modules that register others)"
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        import_plugins()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        import_plugins()
        return iter(tuple(self._items))

    def values(self) -> tuple[Item, ...]:
        """Return all items."""
        import_plugins()
        return tuple(self._items.values())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Take back on leaving what was registered inside: for tests and trials."""
        before = dict(self._items)
        try:
            yield
        finally:
            self._items = before


def import_plugins() -> None:
    """Import the modules of ``$TIERHINTS_PLUGINS``, each once; raises InputError for one that
    can't be imported.
    """
    for entry in os.environ.get(PLUGINS_VARIABLE, "").split(","):
        name = entry.strip()
        if not name or name in _imported:
            continue
        _imported.add(name)  # before: a plugin looks things up while it is imported
        try:
            importlib.import_module(name)
        except Exception as error:
            _imported.discard(name)
            raise InputError(
                f"plugin {name!r} of ${PLUGINS_VARIABLE} can't be imported "
                f"({type(error).__name__}: {error}): name an installed module, or one on PYTHONPATH"
            ) from error


def _definition(item: object) -> tuple[str, str]:
    """Return the module and name of a class, or of an object's."""
    cls = item if isinstance(item, type) else type(item)
    return cls.__module__, cls.__qualname__
