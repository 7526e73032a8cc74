"""Versions of packages, including this one where it is used from a checkout without installation."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

UNKNOWN = "0+unknown"


def find(package: str) -> str | None:
    """The version of a package, None where it is not there; never raises for one that has no metadata.

    importlib.metadata is slow to import, so this does it on demand.
    """
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return own_declared() if package == "fastattn" else _of_module(package)


def version(package: str) -> str:
    """The version as text, UNKNOWN where there is none; never raises."""
    return find(package) or UNKNOWN


def own_declared() -> str:
    """The version in the checkout's pyproject.toml; UNKNOWN if there is none of this project."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    if (
        'name = "fastattn"' not in text
    ):  # the pyproject.toml of another project that contains a copy of the package
        return UNKNOWN
    lines = [line.partition("=") for line in text.splitlines()]
    return next(value.strip().strip('"') for key, _, value in lines if key.strip() == "version")


def _of_module(package: str) -> str | None:
    """`__version__` of a module whose distribution has another name, as Triton's has in some builds of torch."""
    if find_spec(package) is None:
        return None
    try:
        return str(getattr(import_module(package), "__version__", UNKNOWN))
    except ImportError:
        return None
