"""The statistics artifact: what calibration measured of every channel. No torch."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from flapcli.architecture.shape import EVERY_MODULE, MODULES, ModelShape, Module
from flapcli.artifacts.reuse import Kind
from flapcli.errors import FlapError, problems
from flapcli.storage.record import Record, unsaid
from flapcli.storage.safetensors_file import Header, TensorSpec, read_header, read_into

FORMAT: Literal["flap-stats/1"] = "flap-stats/1"
Vector = NDArray[np.float32]
GramDtype = Literal["F32", "BF16"]
GRAM_STORED = {"F32": "<f4", "BF16": "<u2"}
UNIT_FIELDS: dict[str, tuple[Module, ...]] = {"fisher": EVERY_MODULE, "elimination": ("attention",)}


@dataclass(frozen=True)
class ModuleStats:
    """Moments of one output projection's input and norms of its weight's columns, each (channels,)."""

    mean: Vector
    variance: Vector
    square_mean: Vector
    weight_square_sum: Vector
    weight_abs_mean: Vector


@dataclass(frozen=True)
class ExpertStats(ModuleStats):
    """Those of a layer's experts, their channels one expert's after the other's, each over the tokens routed to it.

    Channels are weighed by the router as what comes out is. `tokens` counts those tokens, `saliency` is the mean over
    them of the router's weight times the norm of what the expert puts out, both (experts,).
    """

    tokens: Vector
    saliency: Vector


def stats_class(module: Module) -> type[ModuleStats]:
    return ExpertStats if module == "experts" else ModuleStats


class Influence(NamedTuple):
    """Block influence (METHOD.md, Depth) of a layer and of its modules on the residual stream."""

    layer: float
    attention: float
    mlp: float


def influence_tensors(layer: int) -> list[TensorSpec]:
    """A layer's block influence and its modules', in the order of `Influence`."""
    blocks = (f"layers.{layer}", *(f"layers.{layer}.{module}" for module in MODULES))
    return [TensorSpec(f"{block}.block_influence", (1,), "F32") for block in blocks]


def layer_tensors(shape: ModelShape, layer: int, gram: GramDtype | None) -> list[TensorSpec]:
    """A layer's tensors, with Gram matrices of that dtype code, in the order they are written."""
    return [*influence_tensors(layer), *module_tensors(shape, layer, gram)]


def unit_fields(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What a file made with these settings holds of units: elimination needs Gram matrices too."""
    return tuple(UNIT_FIELDS)[: 1 + bool(settings.get("gram"))] if settings.get("fisher") else ()


def unit_tensors(shape: ModelShape, layer: int, fields: Iterable[str]) -> list[TensorSpec]:
    """A layer's Fisher information and elimination, those of them that `fields` names."""
    return [
        TensorSpec(f"layers.{layer}.{module}.{field}", (shape.units(layer, module),), "F32")
        for field in fields
        for module in UNIT_FIELDS[field]
        if module in shape.modules
    ]


def module_tensors(shape: ModelShape, layer: int, gram: GramDtype | None) -> Iterable[TensorSpec]:
    """Moments, norms and Gram matrices of a layer's modules."""
    for module in shape.modules:
        channels, experts, size = shape.channels(layer, module), *shape.layers[layer][4:]
        for field in stats_class(module).__dataclass_fields__:
            per_expert = field in ("tokens", "saliency")
            yield TensorSpec(f"layers.{layer}.{module}.{field}", (experts if per_expert else channels,), "F32")
        if gram and channels:
            square = (experts, size, size) if module == "experts" else (channels, channels)
            yield TensorSpec(f"layers.{layer}.{module}.gram", square, gram)


def gram_bytes(shape: ModelShape, layer: int, gram: GramDtype = "F32") -> int:
    """Bytes of a layer's Gram matrices."""
    return sum(spec.nbytes for spec in module_tensors(shape, layer, gram) if spec.name.endswith(".gram"))


def file_bytes(shape: ModelShape, gram: GramDtype | None) -> int:
    """Bytes of all tensors of a stats file of this model, with Fisher information and elimination."""
    layers = range(shape.num_layers)
    specs = [(*layer_tensors(shape, layer, gram), *unit_tensors(shape, layer, UNIT_FIELDS)) for layer in layers]
    return sum(spec.nbytes for spec in chain.from_iterable(specs))


def read_gram(path: Path, spec: TensorSpec, offset: int) -> NDArray[np.float32]:
    stored = np.empty(spec.shape, GRAM_STORED[spec.dtype])
    if stored.size:
        read_into(path, offset, stored.reshape(-1).view(np.uint8).data)
    return stored if spec.dtype == "F32" else (stored.astype("<u4") << 16).view("<f4")


def tokens_of_experts(path: Path, layer: int) -> Vector:
    """How many tokens of a stats file's calibration came to each expert of a layer."""
    header, name = read_header(path), f"layers.{layer}.experts.tokens"
    found = np.empty(header.tensors[name].shape, "<f4")
    read_into(path, header.offsets[name], found.view(np.uint8).data)
    return found


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to the nearest bfloat16, ties to even, as its bits (numpy knows no bfloat16)."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = np.empty(values.shape, "<u2")
    for row in range(len(bits)):
        rounded[row] = (bits[row] + 0x7FFF + ((bits[row] >> 16) & 1)) >> 16
    return rounded


class Calibration(Record):
    """The text that was run and how.

    `source_sha256` is of the text where it lies on this machine, `windows_sha256` of the token ids that were run,
    int64, `tokenizer_sha256` of the files beside the weights that decide them; None in files that were written before
    flap kept it. `begins_with` are the special tokens that every window begins with, where the tokenizer has some.
    """

    dataset: str
    nsamples: int
    seqlen: int
    seed: int
    tokens: int
    dtype: str
    text_column: str = "text"
    source_sha256: str | None = None
    windows_sha256: str | None = None
    tokenizer_sha256: str | None = None
    begins_with: str | None = unsaid()
    mode: Literal["in-memory", "streamed"] | None = None


class StatsHeader(Record):
    """The JSON object under the file's metadata key `flap`. `settings` are the options as asked."""

    format: Literal["flap-stats/1"] = FORMAT
    model: ModelShape
    calibration: Calibration
    settings: dict[str, str | int | bool | None]
    versions: dict[str, str]


@dataclass(frozen=True)
class Stats:
    """The artifact in memory; Gram matrices stay in the file and are read by `gram`.

    `influences` are the layers' in order, None in files that were written before flap kept them. `fisher` holds the
    units' Fisher information (METHOD.md, Fisher information), (units,) each, None where calibration was not asked for
    it, and `elimination` the losses that those of attention go at (METHOD.md, Elimination), where Gram matrices were
    asked for too.
    """

    header: StatsHeader
    modules: dict[tuple[int, Module], ModuleStats]
    influences: list[Influence] | None = None
    fisher: dict[tuple[int, Module], Vector] | None = None
    elimination: dict[tuple[int, Module], Vector] | None = None
    path: Path | None = None

    @property
    def model(self) -> ModelShape:
        return self.header.model

    def gram(self, layer: int, module: Module) -> NDArray[np.float32]:
        """Mean of x xᵀ, (channels, channels). Raises FlapError where calibration did not keep it."""
        name = f"layers.{layer}.{module}.gram"
        header = self._file_header
        if self.path is None or header is None or name not in header.tensors:
            raise FlapError(f"{self.path} has no Gram matrices: run `flap calibrate --gram`")
        return read_gram(self.path, header.tensors[name], header.offsets[name])

    @cached_property
    def _file_header(self) -> Header | None:
        return read_header(self.path) if self.path else None


def load_header(path: Path) -> StatsHeader:
    """The header alone. Raises FlapError where the file is missing, corrupt, or no stats file."""
    return _header_and_specs(path)[0]


def load_stats(path: Path) -> Stats:
    """Read and check a stats file. Raises FlapError naming what does not fit."""
    header, specs = _header_and_specs(path)
    layers, fields = range(header.model.num_layers), unit_fields(header.settings)
    moments = [spec for layer in layers for spec in module_tensors(header.model, layer, None)]
    turned = [spec for layer in layers for spec in influence_tensors(layer)]
    turned = turned if any(spec.name in specs for spec in turned) else []  # older files hold none
    units = [spec for layer in layers for spec in unit_tensors(header.model, layer, fields)]
    wanted = {spec.name: spec for spec in (*moments, *turned, *units)}
    wrong = [
        f"{name}: expected {_describe(spec)}, found {_describe(specs.get(name))}"
        for name, spec in wanted.items()
        if specs.get(name) != spec
    ]
    if wrong:
        raise FlapError(f"{path} is corrupt: {'; '.join(wrong[:4])}")
    from safetensors.numpy import safe_open

    with safe_open(path, framework="np") as file:
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in wanted}
    if infinite := [name for name, value in tensors.items() if not np.isfinite(value).all()]:
        raise FlapError(f"{path} is corrupt: {infinite[0]} has values that are not finite")
    modules = {
        (layer, module): stats_class(module)(
            **{f: tensors[f"layers.{layer}.{module}.{f}"] for f in stats_class(module).__dataclass_fields__}
        )
        for layer, module in product(layers, header.model.modules)
    }
    values = [float(tensors[spec.name][0]) for spec in turned]
    influences = [Influence(*values[i : i + 3]) for i in range(0, len(values), 3)]
    per_unit = {
        field: {
            (layer, module): tensors[f"layers.{layer}.{module}.{field}"]
            for layer, module in product(layers, UNIT_FIELDS[field])
            if module in header.model.modules
        }
        for field in fields
    }
    return Stats(header, modules, influences or None, **per_unit, path=path)


def _header_and_specs(path: Path) -> tuple[StatsHeader, dict[str, TensorSpec]]:
    if not path.exists():
        raise FlapError(f"no statistics at {path}: run `flap calibrate` first")
    found = read_header(path)
    if "flap" not in found.metadata:
        raise FlapError(f"{path} is not a flap stats file (its metadata has no key `flap`)")
    try:
        header = StatsHeader.model_validate(json.loads(found.metadata["flap"]))
    except ValidationError as error:
        raise FlapError(f"{path}: its header is not of format {FORMAT}: {problems(error)}") from error
    except ValueError as error:
        raise FlapError(f"{path} is corrupt: its header is not JSON") from error
    if len(header.model.layers) != header.model.num_layers:
        raise FlapError(f"{path} is corrupt: {header.model.num_layers} layers, sizes of {len(header.model.layers)}")
    return header, found.tensors


def _describe(spec: TensorSpec | None) -> str:
    return f"{list(spec.shape)} {spec.dtype}" if spec else "nothing"


def _is_ours(path: Path) -> bool:
    try:
        return path.is_file() and "flap" in read_header(path).metadata
    except FlapError:
        return path.name == "stats.safetensors"


STATS = Kind(load_header, _is_ours, "exists and is not a flap stats file; move it away or write elsewhere")
