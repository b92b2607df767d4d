"""What several stages share: where they run, default texts, versions."""

import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from flapcli import __version__
from flapcli.checkpoint import DEMO
from flapcli.errors import UsageError


@dataclass(frozen=True)
class Compute:
    """Where and in what portions the model runs; changes no result beyond rounding."""

    device: str = "auto"
    batch_size: int | None = None
    threads: int | None = None
    stream: bool | None = None


@dataclass(frozen=True)
class CalibrateOptions:
    """What decides the statistics; recorded and compared by the cache."""

    dataset: str
    nsamples: int = 1024
    seqlen: int = 128
    seed: int = 0
    dtype: str = "auto"
    gram: bool = False
    text_column: str = "text"
    gram_dtype: str = "float32"
    fisher: bool = False


@dataclass(frozen=True)
class Scale:
    """How a calibration copes with size; changes no result beyond rounding. None as `stream`: where it must."""

    stream: bool | None = None
    activation_memory: str = "8GB"
    device_map: str | None = None
    rank_timeout: float = 60.0


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


def several_processes() -> bool:
    """Whether torchrun (or a like launcher) started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def refuse_several_processes() -> None:
    """Raise UsageError under torchrun, for commands whose stages would all run once for each process."""
    if several_processes():
        raise UsageError("of all commands only calibrate runs under torchrun; the others take its statistics")


def is_writer() -> bool:
    """Whether this process writes artifacts and reports: the only one, or rank 0."""
    return not several_processes() or os.environ["RANK"] == "0"
