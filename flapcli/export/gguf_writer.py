"""Write a checkpoint as GGUF, one tensor in memory at a time.

llama.cpp's architecture `deci` has head counts and widths per layer and optional biases on the output
projections, which is what pruning needs; architecture/families/*.json say which families are a case of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, RopeScalingType, quantize
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from flapcli.architecture.family import GgufExport
from flapcli.architecture.rope import llama3_factors, rope_of
from flapcli.architecture.shape import MODULES, LayerShape, Module
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.checkpoints.gguf import transformers_names
from flapcli.errors import FlapError
from flapcli.export.tokenizer import Field
from flapcli.progress import Progress
from flapcli.storage.atomic import atomic_file, require_space

# How matrices are stored by --outtype, and what the file says of it.
OUTTYPES = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32), "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16), "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its llama.cpp name, its shape (rows, columns), how it is stored, and its values."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size


def target(checkpoint: Checkpoint) -> GgufExport:
    """The architecture of llama.cpp that the checkpoint is a case of. Raises FlapError, saying why, where none is."""
    family, config = checkpoint.family, checkpoint.config
    export = family.gguf.export
    if isinstance(export, str):
        raise FlapError(f"{checkpoint.name}: family {family.name} can't be exported to GGUF: {export}")
    for key, allowed in export.requires.items():
        if config.get(key) not in allowed:
            raise FlapError(
                f"{checkpoint.name}: {key} is {config.get(key)} in config.json, and llama.cpp's {export.architecture} "
                f"knows only {' or '.join(map(str, allowed))}"
            )
    if (kind := rope_of(config)["rope_type"]) not in ("default", "linear", "llama3"):
        raise FlapError(f"{checkpoint.name}: rope scaling {kind} is not exported; default, linear and llama3 are")
    return export


def entries(checkpoint: Checkpoint, outtype: str) -> list[Entry]:
    """Every tensor of the file, decided from headers alone."""
    export, shape = target(checkpoint), checkpoint.shape
    known = transformers_names(checkpoint.family, shape.num_layers, export.architecture)
    names = {ours: theirs for theirs, ours in known.items()}
    made = [
        _entry(names[name], spec.shape, outtype, _reader(checkpoint, name, export))
        for name, spec in checkpoint.tensors.items()
    ]
    for layer in range(shape.num_layers):
        for module in MODULES:
            if shape.units(layer, module) == 0:
                made += _zero_unit(checkpoint, names, layer, module, outtype)
    rope = rope_of(checkpoint.config)
    if rope["rope_type"] == "llama3":
        factors = torch.from_numpy(llama3_factors(rope, shape.head_dim))
        made.append(Entry("rope_freqs.weight", tuple(factors.shape), Kind.F32, lambda: factors))
    return made


def _entry(name: str, shape: tuple[int, ...], outtype: str, make: Callable[[], torch.Tensor]) -> Entry:
    """Vectors stay F32, as llama.cpp has them; rows that Q8_0's blocks do not divide become F16."""
    kind = OUTTYPES[outtype][0] if len(shape) > 1 else Kind.F32
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F16
    return Entry(name, shape, kind, make)


def _reader(checkpoint: Checkpoint, name: str, export: GgufExport) -> Callable[[], torch.Tensor]:
    if any(f".{producer}." in name for producer in export.permuted):
        return lambda: permute(checkpoint.read(name), checkpoint.shape.head_dim)
    return lambda: checkpoint.read(name)


def permute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Interleave the two rotary halves of each head's rows, as llama.cpp's `normal` rotation reads them."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _zero_unit(checkpoint: Checkpoint, names: dict[str, str], layer: int, module: Module, outtype: str) -> list[Entry]:
    """One head or neuron of zeros for a module that pruning emptied.

    llama.cpp's deci skips a module that has no units together with its bias, and with the MLP even the
    attention before it (`continue` in its layer loop); a unit of zeros adds exactly the bias and nothing else.
    """
    shape, family = checkpoint.shape, checkpoint.family
    description = family.module(module)
    rows, size = checkpoint.rows(module), 1 if module == "mlp" else shape.head_dim
    shapes = {part: (sum(rows[part].per.values()), shape.hidden_size) for part in description.producers}
    shapes[description.output] = (shape.hidden_size, size)
    prefix = family.layer.format(i=layer)
    return [
        _entry(names[f"{prefix}.{part}.weight"], size, outtype, lambda size=size: torch.zeros(size))  # type: ignore[misc]
        for part, size in shapes.items()
    ]


def write(
    out: Path,
    checkpoint: Checkpoint,
    outtype: str,
    tensors: list[Entry],
    vocabulary: list[Field],
    made_by: str,
    progress: Progress,
) -> None:
    """Write a file of `tensors` atomically, one in memory at a time; `made_by` is kept under `flap`, for the cache."""
    total = sum(entry.nbytes for entry in tensors)
    require_space(out.parent, total)
    with atomic_file(out) as scratch, progress.task("export", total, "bytes") as advance:
        writer = GGUFWriter(scratch, target(checkpoint).architecture)
        try:
            writer.add_string("flap", made_by)
            _add_parameters(writer, checkpoint, outtype)
            for field in vocabulary:
                writer.add_key_value(*field)
            for entry in tensors:
                writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, entry.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with torch.inference_mode():
                for entry in tensors:
                    writer.write_tensor_data(_encode(entry))
                    advance(entry.nbytes)
        finally:
            writer.close()


def _add_parameters(writer: GGUFWriter, checkpoint: Checkpoint, outtype: str) -> None:
    """The model's sizes, an emptied module's as the one unit of zeros that stands for it."""
    config, shape = checkpoint.config, checkpoint.shape
    layers = [LayerShape(*(max(size, 1) for size in layer)) for layer in shape.layers]
    writer.add_name(f"{Path(checkpoint.name).name} pruned by flap")
    writer.add_file_type(OUTTYPES[outtype][1])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(config.get("max_position_embeddings") or 2048)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length([layer.intermediate_size for layer in layers])
    writer.add_head_count([layer.num_attention_heads for layer in layers])
    writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or 1e-6)
    writer.add_vocab_size(checkpoint.vocabulary)
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _encode(entry: Entry) -> NDArray[Any]:
    """A tensor's values as the file stores them. Raises FlapError where float16 can't hold them."""
    values = entry.make()
    if tuple(values.shape) != entry.shape:
        raise FlapError(f"tensor {entry.name} has shape {list(values.shape)}, expected {list(entry.shape)}")
    if entry.kind == Kind.BF16:
        return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if entry.kind == Kind.F16:
        half = values.to(torch.float16)
        if not torch.isfinite(half).all() and torch.isfinite(values).all():
            raise FlapError(f"tensor {entry.name} has values beyond float16: use --outtype bf16 or f32")
        return half.contiguous().numpy()
    return quantize(values.float().contiguous().numpy(), entry.kind)
