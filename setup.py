"""Which packages a wheel holds: the library, found under the name of its folder."""

from setuptools import find_packages, setup

setup(packages=["tierhints", *(f"tierhints.{name}" for name in find_packages("lib"))])
