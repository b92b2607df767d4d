"""The plan artifact: which units stay, for people to read and edit. No torch."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from flapcli.architecture.shape import EVERY_MODULE, MODULES, AttentionUnit, ModelShape, Module, PerModule, spare_units
from flapcli.artifacts.target import Target
from flapcli.errors import FlapError, problems
from flapcli.storage.atomic import atomic_file
from flapcli.storage.record import Record

FORMAT: Literal["flap-plan/1"] = "flap-plan/1"
MAX_UNITS = 10**7  # of a module
Count = Annotated[int, Field(ge=0, lt=2**63)]


class ModelRef(Record):
    name: str
    revision: str | None = None
    fingerprint: str
    family: str


class StatsRef(Record):
    """`path` is relative to the plan's folder where the stats lie in or below it."""

    path: str
    sha256: str


class Ratio(Record):
    requested: float
    achieved: float


class UnitSize(Record):
    """Weights of one unit, and entries of the producing projections' biases that go with it.

    `shared` counts a layer's keys and values, weights and biases, where they go with the last of its query heads alone.
    `groups` are the heads that are written where none stays, if more than one (`shape.spare_units`).
    `whole`: the module's units stay or go together alone, and do not count as prunable.
    """

    weights: Count
    biases: Count
    shared: Count | None = None
    groups: Count | None = None
    whole: Literal[True] | None = None


class Parameters(Record):
    """Weights that could go, that stay, and the whole model's parameters before and after.

    `model_after` is before compensation adds biases, with what is written of a module that keeps nothing
    (`ModelShape.written`) in a layer that keeps something; other layers count as gone. `per_unit` is what the others
    are recomputed from.
    """

    prunable: Count
    kept: Count
    model: Count
    model_after: Count
    per_unit: PerModule[UnitSize]


class ModulePlan(Record):
    """`keep`: the units that stay, as comma-separated inclusive ranges of indices below `of`."""

    unit: Literal["head", "kv_group", "query_head", "neuron"]
    of: Count
    keep: str

    @property
    def is_emptied(self) -> bool:
        """Whether units go, and none stays."""
        return self.of > 0 and not self.keep.strip()


class LayerPlan(Record):
    """A module of no units is one that the layer does not have. Neurons of experts are counted one expert's after the
    other's, and an expert that keeps none goes with its row of the router."""

    index: int
    attention: ModulePlan
    mlp: ModulePlan
    shared_expert: ModulePlan | None = None
    experts: ModulePlan | None = None

    def module(self, module: Module) -> ModulePlan:
        return getattr(self, module) or ModulePlan(unit="neuron", of=0, keep="")


class Plan(Record):
    format: Literal["flap-plan/1"] = FORMAT
    model: ModelRef
    stats: StatsRef
    method: str
    metric: str
    structure: str
    settings: dict[str, str | int | float | bool | None]
    ratio: Ratio
    parameters: Parameters
    layers: list[LayerPlan]

    def kept(self, layer: int, module: Module) -> NDArray[np.int64]:
        """Indices of the units that stay, ascending."""
        return parse_ranges(self.layers[layer].module(module).keep)

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that its layers have, or some of them."""
        return tuple(module for module in EVERY_MODULE if module in self.parameters.per_unit)

    @property
    def present(self) -> tuple[Module, ...]:
        """The modules that people are shown: all but an MLP of experts' families that have none."""
        there = (m for m in self.modules if any(layer.module(m).of for layer in self.layers))
        return self.modules if self.modules == MODULES else tuple(there)

    @property
    def target(self) -> Target | None:
        """The parameters or bytes that were asked for in the place of a ratio; None without."""
        return Target.of_settings(self.settings)

    @property
    def attention_unit(self) -> AttentionUnit | None:
        """What to read the model's attention as; None where it has one unit alone."""
        units = {layer.attention.unit for layer in self.layers} & {"kv_group", "query_head"}
        return "query_head" if "query_head" in units else "kv_group" if units else None

    def counts(self, module: Module) -> list[int]:
        """How many units stay, layer by layer."""
        return [len(self.kept(layer, module)) for layer in range(len(self.layers))]


def build_plan(
    shape: ModelShape, stats: StatsRef, kept: dict[tuple[int, Module], NDArray[np.int64]], ratio: float, **chosen: Any
) -> Plan:
    """A plan from kept indices; `chosen` are method, metric, structure and settings."""

    def module_plan(layer: int, module: Module) -> ModulePlan:
        units, keep = shape.units(layer, module), format_ranges(kept[layer, module])
        return ModulePlan.model_validate({"unit": shape.unit(module), "of": units, "keep": keep})

    layers = [
        LayerPlan.model_validate({"index": i} | {module: module_plan(i, module) for module in shape.modules})
        for i in range(shape.num_layers)
    ]
    shared: dict[Module, int | None] = {"attention": shape.shared_entries or None}
    nothing = np.zeros(0, dtype=np.int64)
    at_once = max(len(shape.written(i, "attention", nothing)) for i in range(shape.num_layers))
    groups: dict[Module, int | None] = {"attention": at_once if at_once > 1 else None}
    per_unit = {
        m: UnitSize(
            weights=shape.unit_parameters(m), biases=shape.unit_biases[m], shared=shared.get(m), groups=groups.get(m),
            whole=None if m in shape.prunable else True,
        )
        for m in shape.modules
    }  # fmt: skip
    model = ModelRef(name=shape.name, revision=shape.revision, fingerprint=shape.fingerprint, family=shape.family)
    return Plan(model=model, stats=stats, layers=layers, **_totals(layers, shape.parameters, per_unit, ratio), **chosen)


def _totals(layers: list[LayerPlan], model: int, per_unit: dict[Module, UnitSize], requested: float) -> dict[str, Any]:
    """`parameters` and `ratio` of a plan: the share of the prunable weights that goes, rounded for readers."""
    of = {m: sum(layer.module(m).of for layer in layers) for m in per_unit}
    stay = {m: sum(len(parse_ranges(layer.module(m).keep)) for layer in layers) for m in per_unit}
    can_go = [m for m in per_unit if not per_unit[m].whole]
    prunable, kept = (sum(counts[m] * per_unit[m].weights for m in can_go) for counts in (of, stay))
    after = model - sum((of[m] - stay[m]) * (per_unit[m].weights + per_unit[m].biases) for m in per_unit)
    for layer in layers:
        goes = not any(layer.module(m).keep.strip() for m in per_unit)
        for m, unit in per_unit.items():
            if goes:
                after -= unit.shared or 0
            elif layer.module(m).is_emptied:
                after += spare_units(m, layer.module(m).of, unit.groups or 1) * (unit.weights + unit.biases)
    achieved = round((prunable - kept) / prunable, 6) if prunable else 0.0
    return {
        "parameters": Parameters(prunable=prunable, kept=kept, model=model, model_after=after, per_unit=per_unit),
        "ratio": Ratio(requested=requested, achieved=achieved),
    }


def format_ranges(indices: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    values = np.asarray(list(indices), dtype=np.int64)
    if len(values) == 0:
        return ""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def parse_ranges(text: str) -> NDArray[np.int64]:
    """`0-2,5` as [0, 1, 2, 5], ascending. Raises ValueError for anything else, duplicates included."""
    if not text.strip():
        return np.zeros(0, dtype=np.int64)
    runs, room = [], MAX_UNITS
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part, re.ASCII)
        if not match:
            raise ValueError(f"{part.strip()!r:.60} is neither an index nor a range such as 3-7")
        first, last = int(match[1]), int(match[2] or match[1])
        room -= last - first + 1
        if last < first or room < 0:
            raise ValueError(f"range {part.strip()} runs backwards or is too long")
        runs.append(np.arange(first, last + 1))
    values = np.sort(np.concatenate(runs))
    if len(twice := values[:-1][np.diff(values) == 0]):
        raise ValueError(f"unit {twice[0]} stands there twice")
    return values


def load_plan(path: Path) -> Plan:
    """Read a plan, edited or not; `achieved` and `parameters` are computed anew from `keep`.

    Raises FlapError that names all that is wrong with it.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise FlapError(f"no plan at {path}: run `flap plan` first") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FlapError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers beyond Python's
        raise FlapError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise FlapError(f"{path} is not a plan of format {FORMAT}")
    try:
        plan = Plan.model_validate(raw)
    except ValidationError as error:
        raise FlapError(f"{path}: {problems(error)}") from error
    if wrong := list(_problems(plan)):
        more = f" and {len(wrong) - 8} more" if wrong[8:] else ""
        raise FlapError(f"{path}: {'; '.join(wrong[:8])}{more}")
    parameters = plan.parameters
    try:
        totals = _totals(plan.layers, parameters.model, parameters.per_unit, plan.ratio.requested)
    except ValidationError as error:
        raise FlapError(f"{path}: more goes than the model has parameters: {problems(error)}") from error
    return plan.model_copy(update=totals)


def found_plan(path: Path, force: bool) -> Plan | None:
    """The plan at `path`, None where nothing is; a foreign file is refused, a broken edit only replaced by `force`."""
    if not path.exists():
        return None
    try:
        return load_plan(path)
    except FlapError as error:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        ours = text.partition("\n")[0].strip() == f"format: {FORMAT}"
        if ours and force:
            return None
        hint = "mend it, or replace it with --force" if ours else "move it away or write elsewhere"
        raise FlapError(f"{error}; {hint}") from error


def _problems(plan: Plan) -> Iterable[str]:
    for place, layer in enumerate(plan.layers):
        if layer.index != place:
            yield f"layer {layer.index} stands where layer {place} belongs"
        for module in plan.modules:
            part = layer.module(module)
            try:
                units = parse_ranges(part.keep)
            except ValueError as error:
                yield f"layer {layer.index}, {module}: {error}"
                continue
            if len(units) and units[-1] >= part.of:
                yield f"layer {layer.index}, {module}: there is no unit {units[-1]} among {part.of} ({part.unit})"


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BaseDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_BaseDumper):
    """Small mappings on one line, `keep` in quotes, for people to read and edit."""


class _OneLine(dict[str, Any]): ...


class _Quoted(str): ...


_Dumper.add_representer(
    _OneLine, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=True)
)
_Dumper.add_representer(
    _Quoted, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style='"')
)


def save_plan(path: Path, plan: Plan) -> None:
    """Write the plan atomically. Raises FlapError where the file system refuses."""
    raw = plan.model_dump(exclude_none=True)
    for key in ("model", "stats", "ratio", "settings"):
        raw[key] = _OneLine(raw[key])
    raw["parameters"]["per_unit"] = {m: _OneLine(size) for m, size in raw["parameters"]["per_unit"].items()}
    for layer in raw["layers"]:
        for module in plan.modules:
            layer[module] = _OneLine(layer[module], keep=_Quoted(layer[module]["keep"]))
    with atomic_file(path) as scratch:
        text = yaml.dump(raw, Dumper=_Dumper, sort_keys=False, width=2**30, allow_unicode=True)
        scratch.write_text(text, encoding="utf-8")
