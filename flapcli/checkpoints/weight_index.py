"""The index of a checkpoint in shards: which file holds which tensor."""

from pathlib import Path

from flapcli.errors import FlapError
from flapcli.storage.json_file import read_json


def index_of(single: str) -> str:
    """The name of the index that stands for a weight file of this name where the weights are in shards."""
    return f"{single}.index.json"


def weight_map(folder: Path, single: str, otherwise: str = "") -> dict[str, str]:
    """File names by tensor. Raises FlapError, begun with `otherwise` where there is no index, else naming its fault.

    The names come from anywhere: only those of files beside the index are taken.
    """
    path = folder / index_of(single)
    found = read_json(path, otherwise).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise FlapError(f"{path} names no weights: its weight_map is {found!r:.60}")
    for tensor, file in found.items():
        if not (isinstance(file, str) and _is_beside(file)):
            raise FlapError(f"{path} names {file!r:.60} for {tensor!r:.80}, which is no file beside it")
    return found


def _is_beside(name: str) -> bool:
    plain = name.isprintable() and len(name) < 256 and "\\" not in name
    return plain and name == Path(name).name and name not in ("", "..")
