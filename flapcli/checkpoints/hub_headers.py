"""A hub repository as a folder of headers: files of weights that say what they hold, and hold holes."""

import json
from contextlib import suppress
from pathlib import Path

from flapcli.checkpoints.hub_errors import why
from flapcli.checkpoints.locate import DEMO, WEIGHTS, Hub, weight_names
from flapcli.errors import FlapError


def with_headers(name: str, hub: Hub, scratch: Path) -> str:
    """What opens as the model `name`: itself where it is on this machine, else a folder in `scratch` without weights.

    Raises FlapError where neither is to be had; repositories of `.bin` files have no headers to read.
    """
    if name == DEMO or Path(name).expanduser().exists() or name.startswith((".", "~", "/")) or name.endswith(".gguf"):
        return name
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    asked = {"revision": hub.revision, "cache_dir": hub.cache_dir}
    with suppress(Exception):  # not in the cache
        cached = Path(snapshot_download(name, local_files_only=True, **asked))
        if all((cached / file).exists() for file in weight_names(cached, WEIGHTS[0])):
            return str(cached)
    try:
        snapshot_download(name, allow_patterns=["*.json"], local_dir=scratch, revision=hub.revision)
        found = get_safetensors_metadata(name, revision=hub.revision)
    except Exception as error:  # as in locate
        raise FlapError(f"{name}: its headers can't be read: {why(error, '; give a local folder')}") from error
    for file, metadata in found.files_metadata.items():
        tensors = {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in metadata.tensors.items()
        }
        hollow(scratch / Path(file).name, tensors | {"__metadata__": dict(metadata.metadata or {})})
    return str(scratch)


def hollow(path: Path, header: dict[str, dict[str, object]]) -> None:
    """A safetensors file of this header, as long as it should be, that takes no room on the disk."""
    text = json.dumps(header).encode()
    size = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)  # type: ignore[index]
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + int(size))
