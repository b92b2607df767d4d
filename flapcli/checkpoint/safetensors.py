"""A Hugging Face folder with safetensors weights, in one file or in shards."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flapcli.checkpoint.base import architecture_digest
from flapcli.checkpoint.folder import TORCH_NAMES, FolderCheckpoint
from flapcli.safetensors_io import Header, TensorSpec, read_header, read_into

if TYPE_CHECKING:
    import torch


class SafetensorsCheckpoint(FolderCheckpoint):
    @cached_property
    def headers(self) -> dict[Path, Header]:
        return {path: read_header(path) for path in self._weight_files("model.safetensors", "safetensors")}

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: path for path, header in self.headers.items() for name in header.tensors}

    @cached_property
    def stored(self) -> dict[str, TensorSpec]:
        return {name: spec for header in self.headers.values() for name, spec in header.tensors.items()}

    @cached_property
    def fingerprint(self) -> str:
        digest = architecture_digest(self.config)
        for path, header in self.headers.items():
            digest.update(f"{path.name} {path.stat().st_size}".encode() + header.raw)
        return digest.hexdigest()

    def read(self, name: str) -> "torch.Tensor":
        import torch

        path, spec = self._places[name], self.stored[name]
        tensor = torch.empty(spec.shape, dtype=getattr(torch, TORCH_NAMES[spec.dtype]))
        if spec.nbytes:
            read_into(path, self.headers[path].offsets[name], tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor
