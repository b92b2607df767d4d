"""Checkpoints as they lie on disk: found, read tensor by tensor, and written; the model is never built."""

from pathlib import Path

from flapcli.checkpoints.bin_folder import BinCheckpoint, has_only_bin
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.checkpoints.gguf import GgufCheckpoint
from flapcli.checkpoints.locate import DEMO, Hub
from flapcli.checkpoints.locate import locate as _locate
from flapcli.checkpoints.safetensors_folder import SafetensorsCheckpoint
from flapcli.errors import FlapError

__all__ = ["DEMO", "Checkpoint", "GgufCheckpoint", "Hub", "open_checkpoint"]


def open_checkpoint(name: str | Path, hub: Hub | None = None) -> Checkpoint:
    """Open a MODEL: a folder, a `.gguf` file, a hub id or `demo`; a Path is no hub id, whatever it looks like.

    Raises FlapError where it can't be found or reached, is of no known family, or is corrupt.
    """
    if isinstance(name, Path) and not name.exists():
        raise FlapError(f"no checkpoint at {name}: `flap apply` writes one to DIR/pruned; or give another by its path")
    name, hub = str(name), hub or Hub()
    found = _locate(name, hub)
    if (found / "adapter_config.json").exists():
        raise FlapError(
            f"{name} holds a LoRA adapter (adapter_config.json), which transformers would add to the weights that lie "
            "there: give the base model, or merge the adapter (peft's merge_and_unload) and give the folder that this "
            "is saved to; where it is merged already, remove adapter_config.json"
        )
    # A file's link keeps its name: the hub's cache links to blobs, whose names say nothing.
    stored = (str(found.absolute() if found.is_file() else found.resolve())) if Path(name).exists() else name
    if found.is_file():
        return GgufCheckpoint(stored, found, hub)
    return (BinCheckpoint if has_only_bin(found) else SafetensorsCheckpoint)(stored, found, hub)
