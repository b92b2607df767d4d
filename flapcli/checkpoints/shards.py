"""Sharded safetensors written as a stream: one tensor in memory, the index last."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flapcli.checkpoints.weight_index import index_of
from flapcli.storage.safetensors_file import StreamWriter, TensorSpec

if TYPE_CHECKING:
    import torch

INDEX = index_of("model.safetensors")


def plan_shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Tensors in their order, cut into shards of at most `max_bytes` (a larger tensor stands alone)."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def write_shards(folder: Path, shards: list[list[TensorSpec]], tensors: Iterator[tuple[str, "torch.Tensor"]]) -> None:
    """Write shards and index into `folder`; `tensors` yields what the shards announce, in order."""
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, specs in zip(names, shards, strict=True):
        with StreamWriter(folder / file, specs, {"format": "pt"}) as writer:
            for _ in specs:
                name, tensor = next(tensors)
                writer.write(name, raw_bytes(tensor))
    index = {
        "metadata": {"total_size": sum(spec.nbytes for specs in shards for spec in specs)},
        "weight_map": {spec.name: file for file, specs in zip(names, shards, strict=True) for spec in specs},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def raw_bytes(tensor: "torch.Tensor") -> memoryview:
    """The tensor's bytes, row-major, whatever its dtype (numpy knows no bfloat16)."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
