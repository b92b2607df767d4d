"""Versions that a result may depend on, as artifacts record them."""

import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from flapcli import __version__


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"flap": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "transformers", "datasets", "gguf"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
