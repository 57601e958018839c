"""Which versions of packages are here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """As it was installed; of a source tree that is only on the path nobody knows."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
