"""What several stages share: where they run, default texts, versions."""

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from flapcli import __version__
from flapcli.checkpoint import DEMO


@dataclass(frozen=True)
class Compute:
    """Where and in what portions the model runs; changes no result beyond rounding."""

    device: str = "auto"
    batch_size: int | None = None
    threads: int | None = None


def default_text(model: str) -> str:
    """The text of `--dataset` and `--perplexity` where none is given: pydoc for the demo, else wikitext2."""
    return "pydoc" if model == DEMO else "wikitext2"


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"flap": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "transformers", "datasets", "gguf"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
