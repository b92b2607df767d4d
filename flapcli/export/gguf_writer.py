"""Write a checkpoint as GGUF, one tensor in memory at a time.

llama.cpp's architecture `deci` has head counts and widths per layer and optional biases on the output projections,
which is what pruning needs; architecture/families/*.json say which families are a case of it, or of another one.
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
from gguf import GGUFValueType as Value
from numpy.typing import NDArray

from flapcli.architecture.gguf_form import SIZES, USUAL, GgufForm
from flapcli.architecture.rope import rope_divisors, rope_of, rotated
from flapcli.architecture.shape import MODULES, OWN_SIZES
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.checkpoints.gguf_layout import GgufLayout, Piece
from flapcli.errors import FlapError
from flapcli.export.tokenizer import Field
from flapcli.progress import Progress
from flapcli.storage.atomic import atomic_file, require_space

# How matrices are stored by --outtype, and what the file says of it.
OUTTYPES = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32), "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16), "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}  # fmt: skip

WRITTEN = {*USUAL, *SIZES.values(), "rope.dimension_count"}  # not as config.json has them
KINDS = {"attention.sliding_window": Value.UINT32}


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


def target(checkpoint: Checkpoint) -> GgufForm:
    """The form that llama.cpp has the checkpoint in. Raises FlapError, saying why, where none is."""
    gguf = checkpoint.family.gguf
    why = [gguf.uneven] if isinstance(gguf.uneven, str) else []
    for form in gguf.forms:
        if (problem := _misfit(checkpoint, form)) is None:
            return form
        why.append(problem)
    raise FlapError(f"{checkpoint.name} can't be exported to GGUF: {'; '.join(why)}")


def _misfit(checkpoint: Checkpoint, form: GgufForm) -> str | None:
    """Why a checkpoint has no such form, None where it has."""
    shape, theirs = checkpoint.shape, f"llama.cpp's {form.architecture}"
    rope, layers = _rope(checkpoint), set(shape.layers)
    scalings = ("default", "linear", "llama3") if form.rope_factors else ("default", "linear")
    outputs = {f"{checkpoint.family.output(i, m)}.bias" for i in range(shape.num_layers) for m in MODULES}
    if not form.output_biases and outputs & checkpoint.tensors.keys():
        return f"{theirs} adds no biases of output projections (`flap apply --compensate none` adds none)"
    if unmet := form.unmet(checkpoint.setting):
        return unmet
    if rope["rope_type"] not in scalings:
        return f"rope scaling {rope['rope_type']} is not exported to {form.architecture}; {', '.join(scalings)} are"
    if not form.per_layer and (len(layers) > 1 or 0 in next(iter(layers))[: len(OWN_SIZES)]):
        return f"{theirs} has the same sizes in every layer (`flap plan --structure UL-UM` plans such)"
    if not form.fewer_heads and next(iter(layers))[0] * shape.head_dim != shape.hidden_size:
        return f"{theirs} can't do with fewer heads (`flap plan --structure UL-MM --remove-heads 0` keeps them)"
    return None


def _rope(checkpoint: Checkpoint) -> dict[str, Any]:
    return rope_of(checkpoint.load_config().to_dict())


def entries(checkpoint: Checkpoint, form: GgufForm, outtype: str) -> list[Entry]:
    """Every tensor of the file, decided from headers alone."""
    layout, shape, made = GgufLayout(checkpoint, form), checkpoint.shape, []
    for name in checkpoint.tensors:
        prefix, _, suffix = name.rpartition(".")
        for ours, part, pieces in layout.targets.get(prefix, [(prefix, prefix, [Piece(prefix, None)])]):
            theirs = layout.names.get(ours)
            if theirs is None or suffix not in ("weight", "bias"):
                raise FlapError(f"{checkpoint.name}: llama.cpp's {form.architecture} has no place for tensor {name}")
            made.append(_entry(f"{theirs}.{suffix}", outtype, Source(layout, part, pieces, suffix)))
    divisors = rope_divisors(_rope(checkpoint), shape.head_dim) if form.rope_factors else None
    if divisors is not None:
        factors = torch.from_numpy(divisors)
        made.append(Entry("rope_freqs.weight", tuple(factors.shape), Kind.F32, lambda: factors))
    return made


@dataclass(frozen=True)
class Source:
    """Whence a tensor's values come: the pieces of ours that make it, and what is done to them."""

    layout: GgufLayout
    part: str
    pieces: list[Piece]
    suffix: str

    @property
    def names(self) -> list[str]:
        return [f"{piece.source}.{self.suffix}" for piece in self.pieces]

    @property
    def is_transposed(self) -> bool:
        return self.layout.is_transposed(self.names[0])

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [self.layout.checkpoint.tensors[name].shape for name in self.names]
        sizes = [size[::-1] for size in sizes] if self.is_transposed else sizes
        rows = [size[0] if p.rows is None else len(p.rows) for size, p in zip(sizes, self.pieces, strict=True)]
        return (sum(rows), *sizes[0][1:])

    @property
    def factor(self) -> float:
        """What the form has no factor for, multiplied in."""
        checkpoint, product = self.layout.checkpoint, 1.0
        for key, power in self.layout.form.scaled.get(self.part, {}).items():
            name = key.removeprefix("tied:")
            if name == key or checkpoint.tied:
                product *= float(checkpoint.sizes.get(name) or checkpoint.setting(name)) ** power
        return product

    def __call__(self) -> torch.Tensor:
        read = {name: self.layout.checkpoint.read(name) for name in dict.fromkeys(self.names)}
        found = []
        for name, piece in zip(self.names, self.pieces, strict=True):
            values = read[name].T if self.is_transposed else read[name]
            found.append(values if piece.rows is None else values[torch.from_numpy(piece.rows)])
        values = torch.cat(found) if found[1:] else found[0]
        if self.layout.is_plus_one(self.names[0]):
            values = values.float() + 1
        return values if self.factor == 1 else values.float() * self.factor


def _entry(name: str, outtype: str, make: Source) -> Entry:
    """A tensor made of ours. Vectors stay F32, as llama.cpp has them, and norms of every head by itself; rows that
    Q8_0's blocks do not divide become F16.
    """
    kind = OUTTYPES[outtype][0] if len(make.shape) > 1 and "norm" not in name else Kind.F32
    if make.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F16
    return Entry(name, make.shape, kind, make)


def write(
    out: Path,
    checkpoint: Checkpoint,
    form: GgufForm,
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
        writer = GGUFWriter(scratch, form.architecture)
        try:
            writer.add_string("flap", made_by)
            _add_parameters(writer, checkpoint, form, outtype)
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


def _add_parameters(writer: GGUFWriter, checkpoint: Checkpoint, form: GgufForm, outtype: str) -> None:
    """The model's sizes, and settings of the form."""
    shape, setting = checkpoint.shape, checkpoint.setting
    layers = shape.layers
    heads, groups, widths = ([layer[i] for layer in layers] if form.per_layer else layers[0][i] for i in range(3))
    writer.add_name(f"{Path(checkpoint.name).name} pruned by flap")
    writer.add_file_type(OUTTYPES[outtype][1])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(setting(form.settings["context_length"]) or 2048)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(widths)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    rope = _rope(checkpoint)
    writer.add_rope_dimension_count(shape.head_dim if form.rope_factors else rotated(rope, shape.head_dim))
    for key, name in form.config.items():
        value = setting(name) if isinstance(name, str) else name
        if key not in WRITTEN and value is not None:
            kind = Value.BOOL if isinstance(value, bool) else KINDS.get(key, Value.FLOAT32)
            writer.add_key_value(f"{form.architecture}.{key}", value, kind)
    writer.add_vocab_size(checkpoint.vocabulary)
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
