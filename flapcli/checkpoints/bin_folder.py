"""A Hugging Face folder with pickled PyTorch weights (`pytorch_model.bin`), in one file or in shards.

Only tensors are unpickled (`weights_only=True`), never code, and their bytes are memory-mapped.
"""

import zipfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flapcli.checkpoints.huggingface import FolderCheckpoint
from flapcli.errors import FlapError, first_line
from flapcli.storage.dtypes import dtype_code, has_code
from flapcli.storage.json_file import lfs_hint
from flapcli.storage.safetensors_file import TensorSpec

if TYPE_CHECKING:
    import torch

SINGLE = "pytorch_model.bin"


def has_only_bin(folder: Path) -> bool:
    """Whether a folder's weights are in .bin files and in no safetensors files."""

    def holds(name: str) -> bool:
        return (folder / name).exists() or (folder / f"{name}.index.json").exists()

    return holds(SINGLE) and not holds("model.safetensors")


class BinCheckpoint(FolderCheckpoint):
    @cached_property
    def files(self) -> list[Path]:
        return self._weight_files(SINGLE, ".bin")

    @cached_property
    def _specs(self) -> dict[Path, dict[str, TensorSpec]]:
        return {path: _headers(path) for path in self.files}

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: path for path, specs in self._specs.items() for name in specs}

    @property
    def in_files(self) -> dict[str, TensorSpec]:
        return {name: spec for specs in self._specs.values() for name, spec in specs.items()}

    @cached_property
    def fingerprint(self) -> str:
        """The archive's directory has the CRC of every member, so the weights themselves are in the hash."""
        digest = self._architecture_digest()
        for path in self.files:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            for member in _directory(path):
                digest.update(f"{member.filename} {member.file_size} {member.CRC}".encode())
        return digest.hexdigest()

    def read_from_file(self, name: str, rows: slice = slice(None)) -> "torch.Tensor":
        # Opened for each tensor: a mapping that is kept would count every page read as ours.
        whole = _load(self._places[name], "cpu")[name]
        return (whole[rows] if rows != slice(None) else whole).clone().contiguous()


def _directory(path: Path) -> list[zipfile.ZipInfo]:
    """Members of a .bin file. Raises FlapError where it is missing, corrupt or of the kind before PyTorch 1.6."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except OSError as error:
        raise FlapError(f"cannot read {path}: {error.strerror}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FlapError(
            f"{path} is truncated, corrupt or of the format before PyTorch 1.6: save it anew by `save_pretrained` of "
            f"a transformers that loads it{lfs_hint(path)}"
        ) from error


def _headers(path: Path) -> dict[str, TensorSpec]:
    import torch

    found = {str(n): t for n, t in _load(path, "meta").items() if isinstance(t, torch.Tensor)}
    if odd := [f"{name} is {tensor.dtype}" for name, tensor in found.items() if not has_code(tensor.dtype)]:
        raise FlapError(f"{path}: tensor {odd[0]}, which flap can't read")
    return {name: TensorSpec(name, tuple(tensor.shape), dtype_code(tensor.dtype)) for name, tensor in found.items()}


def _load(path: Path, place: str) -> "dict[str, torch.Tensor]":
    import pickle

    import torch

    _directory(path)
    try:
        found = torch.load(path, map_location=place, weights_only=True, mmap=place == "cpu")
    except pickle.UnpicklingError as error:
        raise FlapError(
            f"{path} holds more than tensors, which are all that flap unpickles: save the model by `save_pretrained`, "
            "as safetensors"
        ) from error
    except Exception as error:  # what a broken pickle raises is of every kind
        raise FlapError(f"{path} is corrupt: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise FlapError(f"{path} holds a {type(found).__name__}, where tensors by name are wanted")
    return found
