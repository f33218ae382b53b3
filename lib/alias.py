"""The package under the name of its folder as well: in a checkout ``lib.x`` is ``tierhints.x``.

The modules are ``tierhints``, whatever they are imported as, so a pickle made in a checkout loads
where the package is installed. ``lib/__init__.py`` calls ``alias_package`` when it is imported as
``lib``; where nobody does that, nothing here is used.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType

NAME = "tierhints"


def alias_package(alias: str, folder: Path) -> None:
    """Make ``alias`` another name of the package and of all its modules.

    The package is the one that is loaded already, else that of ``folder``; a warning names both
    where they differ.
    """
    loaded = sys.modules.get(NAME)
    used = folder if loaded is None else Path(loaded.__path__[0])
    if used.resolve() != folder.resolve():
        warnings.warn(
            f"{NAME} is loaded from {used}, so {alias} is that, not {folder}: import {alias} "
            f"first, or install {NAME} from this checkout",
            stacklevel=2,
        )
    sys.meta_path.insert(0, _AliasFinder(alias, used))
    # What is in sys.modules at the end of an import is what was imported.
    sys.modules[alias] = importlib.import_module(NAME)


class _AliasFinder(MetaPathFinder):
    """Finds the package itself in a folder, and its modules by their names under the alias."""

    def __init__(self, alias: str, folder: Path) -> None:
        self._alias = alias
        self._folder = folder

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return the spec of the package, or of a module under the alias; else None."""
        if fullname == NAME:
            return importlib.util.spec_from_file_location(
                NAME,
                self._folder / "__init__.py",
                submodule_search_locations=[str(self._folder)],
            )
        alias, _, rest = fullname.partition(".")
        if alias != self._alias or not rest:
            return None
        real = importlib.util.find_spec(f"{NAME}.{rest}")
        if real is None:
            return None
        spec = ModuleSpec(fullname, _AliasLoader(real), origin=real.origin)
        spec.submodule_search_locations = real.submodule_search_locations
        return spec


class _AliasLoader(Loader):
    """Puts the real module into ``sys.modules`` under the alias."""

    def __init__(self, real: ModuleSpec) -> None:
        self._real = real

    def exec_module(self, module: ModuleType) -> None:
        """Replace ``module``, which is empty and which nobody has seen."""
        sys.modules[module.__name__] = importlib.import_module(self._real.name)

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the compiled module, for ``python -m``."""
        loader = self._real.loader
        assert isinstance(loader, InspectLoader)  # a file of the package
        return loader.get_code(self._real.name)
