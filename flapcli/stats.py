"""The statistics artifact: what calibration measured of every channel (DESIGN 1.3). No torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from flapcli.errors import FlapError
from flapcli.rundir import atomic_file
from flapcli.safetensors_io import StreamWriter, TensorSpec, read_header
from flapcli.shape import MODULES, ModelShape, Module

FORMAT: Literal["flap-stats/1"] = "flap-stats/1"
Vector = NDArray[np.float32]


class Calibration(BaseModel):
    """The text that was run and how. `source_sha256` is of the text where it lies on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    nsamples: int
    seqlen: int
    seed: int
    tokens: int
    dtype: str
    text_column: str = "text"
    source_sha256: str | None = None


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


@dataclass(frozen=True)
class Stats:
    """The artifact in memory; Gram matrices stay in the file and are read by `gram`."""

    header: StatsHeader
    modules: dict[tuple[int, Module], ModuleStats]
    path: Path | None = None

    @property
    def model(self) -> ModelShape:
        return self.header.model

    def gram(self, layer: int, module: Module) -> NDArray[np.float32]:
        """Mean of x xᵀ, (channels, channels). Raises FlapError where calibration did not keep it."""
        from safetensors import SafetensorError, safe_open

        name = f"layers.{layer}.{module}.gram"
        try:
            with safe_open(self.path, framework="np") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise FlapError(f"{self.path} has no Gram matrices: run `flap calibrate --gram`") from error


def expected_tensors(shape: ModelShape) -> Iterable[TensorSpec]:
    """Name and shape of every vector that a stats file of this model holds."""
    for layer in range(shape.num_layers):
        for module in MODULES:
            channels = shape.units(layer, module) * shape.channels_per_unit(module)
            for field in ModuleStats.__dataclass_fields__:
                yield TensorSpec(f"layers.{layer}.{module}.{field}", (channels,), "F32")


def save_stats(
    path: Path,
    header: StatsHeader,
    modules: dict[tuple[int, Module], ModuleStats],
    grams: dict[tuple[int, Module], NDArray[np.float32]] | None = None,
) -> None:
    """Write the artifact atomically. Raises FlapError where the file system refuses."""
    tensors = {
        f"layers.{layer}.{module}.{field}": getattr(stats, field)
        for (layer, module), stats in modules.items()
        for field in ModuleStats.__dataclass_fields__
    }
    tensors |= {f"layers.{layer}.{module}.gram": gram for (layer, module), gram in (grams or {}).items()}
    specs = [TensorSpec(name, value.shape, "F32") for name, value in tensors.items()]
    metadata = {"flap": header.model_dump_json()}
    with atomic_file(path) as scratch, StreamWriter(scratch, specs, metadata) as writer:
        for name, value in tensors.items():
            writer.write(name, np.ascontiguousarray(value, dtype="<f4").data.cast("B"))


def load_header(path: Path) -> StatsHeader:
    """The header alone. Raises FlapError where the file is missing, corrupt, or no stats file."""
    return _header_and_specs(path)[0]


def load_stats(path: Path) -> Stats:
    """Read and check a stats file. Raises FlapError naming what does not fit."""
    header, specs = _header_and_specs(path)
    wrong = [
        f"{want.name}: expected {list(want.shape)} {want.dtype}, found {_describe(specs.get(want.name))}"
        for want in expected_tensors(header.model)
        if specs.get(want.name) != want
    ]
    if wrong:
        raise FlapError(f"{path} is corrupt: {'; '.join(wrong[:4])}")
    from safetensors.numpy import safe_open

    with safe_open(path, framework="np") as file:
        tensors: dict[str, Any] = {s.name: file.get_tensor(s.name) for s in expected_tensors(header.model)}
    infinite = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if infinite:
        raise FlapError(f"{path} is corrupt: {infinite[0]} has values that are not finite")
    modules = {
        (layer, module): ModuleStats(
            **{f: tensors[f"layers.{layer}.{module}.{f}"] for f in ModuleStats.__dataclass_fields__}
        )
        for layer in range(header.model.num_layers)
        for module in MODULES
    }
    return Stats(header, modules, path)


def has_gram(path: Path) -> bool:
    """Whether the file holds Gram matrices."""
    return any(name.endswith(".gram") for name in read_header(path).tensors)


def _header_and_specs(path: Path) -> tuple[StatsHeader, dict[str, TensorSpec]]:
    if not path.exists():
        raise FlapError(f"no statistics at {path}: run `flap calibrate` first, or give --stats")
    found = read_header(path)
    if "flap" not in found.metadata:
        raise FlapError(f"{path} is not a flap stats file (its metadata has no key `flap`)")
    try:
        header = StatsHeader.model_validate(json.loads(found.metadata["flap"]))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise FlapError(f"{path}: its header is not of format {FORMAT}: {problems}") from error
    except ValueError as error:
        raise FlapError(f"{path} is corrupt: its header is not JSON") from error
    if len(header.model.layers) != header.model.num_layers:
        raise FlapError(f"{path} is corrupt: {header.model.num_layers} layers, sizes of {len(header.model.layers)}")
    return header, found.tensors


def _describe(spec: TensorSpec | None) -> str:
    return f"{list(spec.shape)} {spec.dtype}" if spec else "nothing"
