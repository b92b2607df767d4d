"""A folder that flap pruned, by its config.json. No torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flapcli.architecture.flap_section import FlapSection
from flapcli.artifacts.reuse import Kind
from flapcli.checkpoints.shards import INDEX
from flapcli.errors import FlapError
from flapcli.storage.safetensors_file import read_header


@dataclass(frozen=True)
class PrunedFolder:
    """Where it lies, its config.json, and what flap says of itself there."""

    path: Path
    config: dict[str, Any]
    flap: FlapSection


def load_pruned(path: Path) -> PrunedFolder:
    """Read a pruned folder's config.json. Raises FlapError where it can't be read, or flap did not write it."""
    place = path / "config.json"
    try:
        config = json.loads(place.read_bytes())
    except (OSError, ValueError) as error:
        raise FlapError(f"{place} can't be read: {error}") from error
    if not isinstance(config, dict) or (flap := FlapSection.of(config, str(path))) is None:
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise FlapError(f"{path} is a checkpoint that flap did not write (model_type {kind})")
    return PrunedFolder(path, config, flap)


def weights_are_whole(folder: PrunedFolder) -> bool:
    """Whether every weight file that the index names is there in its full length, with the tensors it should hold."""
    try:
        index = json.loads((folder.path / INDEX).read_bytes())["weight_map"]
        headers = {file: read_header(folder.path / file) for file in set(index.values())}
        return all(name in headers[file].tensors for name, file in index.items())
    except (FlapError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


PRUNED = Kind(
    load_pruned,
    lambda path: path.is_dir() and not any(path.iterdir()),  # an empty folder
    "holds something that flap did not write: move it away or give another --out",
)


def found_pruned(path: Path) -> PrunedFolder | None:
    """The pruned folder at `path` where one can be read, for those who only show what is there."""
    try:
        return load_pruned(path)
    except FlapError:
        return None
