"""Which packages a wheel holds: the library, found under the name of its folder.

With TIERHINTS_BUILD_NATIVE=1 and without build isolation (the kernels are built for the torch that
is here) a wheel holds the C++ kernels, too, and is of this platform:

    TIERHINTS_BUILD_NATIVE=1 pip install --no-build-isolation .
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

VARIABLE = "TIERHINTS_BUILD_NATIVE"


class BuildWithKernels(build_py):
    """Puts the kernels beside their sources; an editable install finds them in the user's cache."""

    def run(self) -> None:
        """Build what a wheel holds."""
        super().run()
        library = str(obtain_library())
        if not self.editable_mode:
            folder = os.path.join(self.build_lib, "tierhints", "codecs", "native")
            self.copy_file(library, folder)


class PlatformWheel(bdist_wheel):
    """A wheel of this platform, for any Python."""

    def finalize_options(self) -> None:
        """Say that files go where a platform's do."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, its ABI and the platform: nothing of Python is linked."""
        return "py3", "none", super().get_tag()[2]


def obtain_library() -> Path:
    """Return the kernels for the torch that is here, built where they aren't yet."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from lib.codecs.native import obtain_native
    except ImportError as error:
        sys.exit(f"{VARIABLE}: the kernels need {error.name}: pip install --no-build-isolation")
    native = obtain_native()
    if native.library is None:
        sys.exit(f"{VARIABLE}: no kernels: {native.reason}")
    return native.library


asked = os.environ.get(VARIABLE, "0")
if asked not in ("0", "1"):
    sys.exit(f"{VARIABLE} is {asked!r}: set 1 for the C++ kernels in the wheel, 0 or nothing")
setup(
    packages=["tierhints", *(f"tierhints.{name}" for name in find_packages("lib"))],
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel} if asked == "1" else {},
)
