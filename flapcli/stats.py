"""The statistics artifact: what calibration measured of every channel (DESIGN 1.3). No torch."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from flapcli.errors import FlapError, problems
from flapcli.rundir import atomic_file
from flapcli.safetensors_io import Header, StreamWriter, TensorSpec, read_header, read_into
from flapcli.shape import MODULES, ModelShape, Module

FORMAT: Literal["flap-stats/1"] = "flap-stats/1"
Vector = NDArray[np.float32]
GramDtype = Literal["F32", "BF16"]
# Of a layer's number, a module's Gram matrix and Fisher information: at what loss each unit goes (elimination.py).
Eliminate = Callable[[int, Module, NDArray[np.float32], Vector], Vector]
UNIT_FIELDS: dict[str, tuple[Module, ...]] = {"fisher": MODULES, "elimination": ("attention",)}
GRAM_STORED = {"F32": "<f4", "BF16": "<u2"}


class Calibration(BaseModel):
    """The text that was run and how.

    `source_sha256` is of the text where it lies on this machine, `windows_sha256` of the token ids that were run,
    int64; None in files that were written before flap kept it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    nsamples: int
    seqlen: int
    seed: int
    tokens: int
    dtype: str
    text_column: str = "text"
    source_sha256: str | None = None
    windows_sha256: str | None = None
    mode: Literal["in-memory", "streamed"] | None = None


class StatsHeader(BaseModel):
    """The JSON object under the file's metadata key `flap`. `settings` are the options as asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["flap-stats/1"] = FORMAT
    model: ModelShape
    calibration: Calibration
    settings: dict[str, str | int | bool | None]
    versions: dict[str, str]


@dataclass(frozen=True)
class ModuleStats:
    """Moments of one output projection's input and norms of its weight's columns, each (channels,)."""

    mean: Vector
    variance: Vector
    square_mean: Vector
    weight_square_sum: Vector
    weight_abs_mean: Vector


class Influence(NamedTuple):
    """Block influence (`influence.turns`, mean over tokens) of a layer and of its modules on the residual stream."""

    layer: float
    attention: float
    mlp: float


@dataclass(frozen=True)
class Stats:
    """The artifact in memory; Gram matrices stay in the file and are read by `gram`.

    `influences` are the layers' in order, None in files that were written before flap kept them. `fisher` holds
    the units' Fisher information (fisher.py), (units,) each, None where calibration was not asked for it, and
    `elimination` the losses that those of attention go at (elimination.py), where Gram matrices were asked for too.
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
        return _read_gram(self.path, header.tensors[name], header.offsets[name])

    @cached_property
    def _file_header(self) -> Header | None:
        return read_header(self.path) if self.path else None


def expected_tensors(shape: ModelShape) -> Iterable[TensorSpec]:
    """Name and shape of every module's moments and norms."""
    for layer in range(shape.num_layers):
        yield from _module_tensors(shape, layer, None)


def _influence_tensors(layer: int) -> list[TensorSpec]:
    """A layer's block influence and its modules', in the order of `Influence`."""
    blocks = (f"layers.{layer}", *(f"layers.{layer}.{module}" for module in MODULES))
    return [TensorSpec(f"{block}.block_influence", (1,), "F32") for block in blocks]


def _layer_tensors(shape: ModelShape, layer: int, gram: GramDtype | None) -> Iterable[TensorSpec]:
    """A layer's tensors, with Gram matrices of that dtype code, in the order they are written."""
    yield from _influence_tensors(layer)
    yield from _module_tensors(shape, layer, gram)


def _unit_fields(header: StatsHeader) -> tuple[str, ...]:
    """What the file holds of units: elimination needs Gram matrices too."""
    settings = header.settings
    return tuple(UNIT_FIELDS)[: 1 + bool(settings.get("gram"))] if settings.get("fisher") else ()


def _unit_tensors(shape: ModelShape, layer: int, fields: Iterable[str]) -> list[TensorSpec]:
    """A layer's Fisher information and elimination, those of them that `fields` names."""
    return [
        TensorSpec(f"layers.{layer}.{module}.{field}", (shape.units(layer, module),), "F32")
        for field in fields
        for module in UNIT_FIELDS[field]
    ]


def _module_tensors(shape: ModelShape, layer: int, gram: GramDtype | None) -> Iterable[TensorSpec]:
    for module in MODULES:
        channels = shape.units(layer, module) * shape.channels_per_unit(module)
        for field in ModuleStats.__dataclass_fields__:
            yield TensorSpec(f"layers.{layer}.{module}.{field}", (channels,), "F32")
        if gram and channels:
            yield TensorSpec(f"layers.{layer}.{module}.gram", (channels, channels), gram)


class StatsWriter:
    """Writes a stats file layer by layer. With `resume`, goes on after the layers that are whole in the file.

    Where the header's settings ask for Fisher information, all layers are followed by theirs, last layer first,
    which is how a backward pass finds it; with Gram matrices, each layer's by what elimination makes of both.
    """

    def __init__(self, path: Path, header: StatsHeader, gram: GramDtype | None, resume: bool = False) -> None:
        shape = header.model
        parts = [list(_layer_tensors(shape, layer, gram)) for layer in range(shape.num_layers)]
        if fields := _unit_fields(header):
            parts += [_unit_tensors(shape, layer, fields) for layer in reversed(range(shape.num_layers))]
        self._parts = parts
        self._specs = {spec.name: spec for specs in parts for spec in specs}
        self._ends = list(accumulate((len(specs) for specs in parts), initial=0))
        metadata = {"flap": header.model_dump_json()}
        self._writer = StreamWriter(path, chain.from_iterable(parts), metadata, resume)

    @property
    def parts(self) -> int:
        """How many layers are whole in the file, and then of how many the Fisher information is."""
        return bisect_right(self._ends, self._writer.written) - 1

    def rewind(self, parts: int) -> None:
        """Go on after the first of the `parts` that are whole."""
        self._writer.rewind(self._ends[parts])

    def write(
        self,
        layer: int,
        modules: Mapping[Module, ModuleStats],
        influence: Influence,
        grams: Mapping[Module, NDArray[np.float32]],
    ) -> None:
        """Append a layer and have it on disk. Raises ValueError out of order or where something is missing."""
        for spec, turned in zip(_influence_tensors(layer), influence, strict=True):
            self._writer.write(spec.name, np.array([turned], "<f4").view(np.uint8).data)
        for spec in self._parts[layer][len(influence) :]:
            _, _, module, field = spec.name.split(".")
            value = grams[module] if field == "gram" else getattr(modules[module], field)  # type: ignore[index]
            if spec.dtype == "BF16":
                value = _bfloat16_bits(value)
            little = value.astype(GRAM_STORED[spec.dtype], order="C", copy=False)
            self._writer.write(spec.name, little.reshape(-1).view(np.uint8).data)
        self._writer.sync()

    def write_fisher(self, layer: int, fisher: Mapping[Module, Vector], eliminate: Eliminate) -> None:
        """Append a layer's Fisher information, with Gram matrices its elimination too, and have it on disk.

        `eliminate` sees the Gram matrices as their dtype in the file left them. Raises ValueError out of order.
        """
        for spec in self._parts[-1 - layer]:
            _, _, name, field = spec.name.split(".")
            module: Module = name  # type: ignore[assignment]
            values = fisher[module]
            if field == "elimination":
                values = eliminate(layer, module, self._gram(layer, module), values)
            self._writer.write(spec.name, values.astype("<f4").view(np.uint8).data)
        self._writer.sync()

    def _gram(self, layer: int, module: Module) -> NDArray[np.float32]:
        """As it is in the file; (0, 0) of a module without channels, which has none."""
        spec = self._specs.get(f"layers.{layer}.{module}.gram")
        if spec is None:
            return np.empty((0, 0), np.float32)
        return _read_gram(self._writer.path, spec, self._writer.offsets[spec.name])

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._writer.__exit__(*exception)


def _read_gram(path: Path, spec: TensorSpec, offset: int) -> NDArray[np.float32]:
    stored = np.empty(spec.shape, GRAM_STORED[spec.dtype])
    if stored.size:
        read_into(path, offset, stored.reshape(-1).view(np.uint8).data)
    return stored if spec.dtype == "F32" else (stored.astype("<u4") << 16).view("<f4")


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to the nearest bfloat16, ties to even, as its bits (numpy knows no bfloat16)."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = np.empty(values.shape, "<u2")
    for row in range(len(bits)):
        rounded[row] = (bits[row] + 0x7FFF + ((bits[row] >> 16) & 1)) >> 16
    return rounded


def save_stats(
    path: Path,
    header: StatsHeader,
    modules: dict[tuple[int, Module], ModuleStats],
    influences: list[Influence],
    grams: dict[tuple[int, Module], NDArray[np.float32]] | None = None,
    fisher: dict[tuple[int, Module], Vector] | None = None,
    gram_dtype: GramDtype = "F32",
    eliminate: Eliminate | None = None,
) -> None:
    """Write the artifact atomically; `fisher` and `eliminate` are there where the header's settings ask for Fisher
    information. `eliminate` makes elimination of it where there are Gram matrices.

    Raises FlapError where the file system refuses.
    """
    gram = None if grams is None else gram_dtype
    with atomic_file(path) as scratch, StatsWriter(scratch, header, gram) as writer:
        for layer in range(header.model.num_layers):
            own = {module: modules[layer, module] for module in MODULES}
            squares = {m: grams[layer, m] for m in MODULES if (layer, m) in grams} if grams else {}
            writer.write(layer, own, influences[layer], squares)
        if fisher and eliminate:
            for layer in reversed(range(header.model.num_layers)):
                writer.write_fisher(layer, {module: fisher[layer, module] for module in MODULES}, eliminate)


def gram_bytes(shape: ModelShape, layer: int, gram: GramDtype = "F32") -> int:
    """Bytes of a layer's Gram matrices."""
    return sum(spec.nbytes for spec in _layer_tensors(shape, layer, gram) if spec.name.endswith(".gram"))


def file_bytes(shape: ModelShape, gram: GramDtype | None) -> int:
    """Bytes of all tensors of a stats file of this model, with Fisher information and elimination."""
    layers = range(shape.num_layers)
    specs = [(*_layer_tensors(shape, layer, gram), *_unit_tensors(shape, layer, UNIT_FIELDS)) for layer in layers]
    return sum(spec.nbytes for spec in chain.from_iterable(specs))


def load_header(path: Path) -> StatsHeader:
    """The header alone. Raises FlapError where the file is missing, corrupt, or no stats file."""
    return _header_and_specs(path)[0]


def load_stats(path: Path) -> Stats:
    """Read and check a stats file. Raises FlapError naming what does not fit."""
    header, specs = _header_and_specs(path)
    layers, fields = range(header.model.num_layers), _unit_fields(header)
    turned = [spec for layer in layers for spec in _influence_tensors(layer)]
    turned = turned if any(spec.name in specs for spec in turned) else []  # older files hold none
    units = [spec for layer in layers for spec in _unit_tensors(header.model, layer, fields)]
    wanted = [*expected_tensors(header.model), *turned, *units]
    wrong = [
        f"{want.name}: expected {list(want.shape)} {want.dtype}, found {_describe(specs.get(want.name))}"
        for want in wanted
        if specs.get(want.name) != want
    ]
    if wrong:
        raise FlapError(f"{path} is corrupt: {'; '.join(wrong[:4])}")
    from safetensors.numpy import safe_open

    with safe_open(path, framework="np") as file:
        tensors: dict[str, Any] = {spec.name: file.get_tensor(spec.name) for spec in wanted}
    infinite = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if infinite:
        raise FlapError(f"{path} is corrupt: {infinite[0]} has values that are not finite")
    modules = {
        (layer, module): ModuleStats(
            **{f: tensors[f"layers.{layer}.{module}.{f}"] for f in ModuleStats.__dataclass_fields__}
        )
        for layer in layers
        for module in MODULES
    }
    values = [float(tensors[spec.name][0]) for spec in turned]
    influences = [Influence(*values[i : i + 3]) for i in range(0, len(values), 3)]
    per_unit = {
        field: {key: tensors[f"layers.{key[0]}.{key[1]}.{field}"] for key in product(layers, UNIT_FIELDS[field])}
        for field in fields
    }
    return Stats(header, modules, influences or None, **per_unit, path=path)


def _header_and_specs(path: Path) -> tuple[StatsHeader, dict[str, TensorSpec]]:
    if not path.exists():
        raise FlapError(f"no statistics at {path}: run `flap calibrate` first, or give --stats")
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
