"""A few tensors saved as one safetensors file, and read again."""

from collections.abc import Mapping
from pathlib import Path

import torch

from flapcli.checkpoints.shards import raw_bytes
from flapcli.storage.atomic import atomic_file
from flapcli.storage.dtypes import dtype_code, torch_dtype
from flapcli.storage.safetensors_file import StreamWriter, TensorSpec, read_header, read_into


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write the file atomically. Raises FlapError where the file system refuses."""
    specs = [TensorSpec(name, tuple(value.shape), dtype_code(value.dtype)) for name, value in tensors.items()]
    with atomic_file(path) as scratch, StreamWriter(scratch, specs, metadata) as out:
        for name, value in tensors.items():
            out.write(name, raw_bytes(value))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata. Raises FlapError where the file is corrupt."""
    header = read_header(path)
    values = {name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)) for name, spec in header.tensors.items()}
    for name, value in values.items():
        if value.numel():
            read_into(path, header.offsets[name], raw_bytes(value))
    return values, header.metadata
