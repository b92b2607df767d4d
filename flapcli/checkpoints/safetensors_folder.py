"""A Hugging Face folder with safetensors weights, whole or in shards."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flapcli.checkpoints.huggingface import FolderCheckpoint
from flapcli.checkpoints.shards import raw_bytes
from flapcli.storage.dtypes import torch_dtype
from flapcli.storage.safetensors_file import Header, TensorSpec, read_header, read_into

if TYPE_CHECKING:
    import torch


class SafetensorsCheckpoint(FolderCheckpoint):
    @cached_property
    def _headers(self) -> dict[Path, Header]:
        return {path: read_header(path) for path in self._weight_files("model.safetensors", "safetensors")}

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: path for path, header in self._headers.items() for name in header.tensors}

    @property
    def in_files(self) -> dict[str, TensorSpec]:
        return {name: spec for header in self._headers.values() for name, spec in header.tensors.items()}

    @cached_property
    def fingerprint(self) -> str:
        digest = self._architecture_digest()
        for path, header in self._headers.items():
            digest.update(f"{path.name} {path.stat().st_size}".encode() + header.raw)
        return digest.hexdigest()

    def read_from_file(self, name: str, rows: slice = slice(None)) -> "torch.Tensor":
        import torch

        path = self._places[name]
        spec = self._headers[path].tensors[name]
        start, stop, _ = rows.indices(spec.shape[0]) if spec.shape else (0, 1, 1)
        tensor = torch.empty((stop - start, *spec.shape[1:]) if spec.shape else (), dtype=torch_dtype(spec.dtype))
        if tensor.numel():
            begin = self._headers[path].offsets[name] + start * (spec.nbytes // spec.shape[0] if spec.shape else 0)
            read_into(path, begin, raw_bytes(tensor))
        return tensor
