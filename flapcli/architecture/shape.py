"""The sizes of a model that planning needs, without the model."""

from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from flapcli.errors import UsageError
from flapcli.storage.record import Record

Module = Literal["attention", "mlp", "shared_expert", "experts"]
EVERY_MODULE: tuple[Module, ...] = ("attention", "mlp", "shared_expert", "experts")
MODULES: tuple[Module, Module] = ("attention", "mlp")  # of every family; where there are experts, layers may lack one
Extent = Annotated[int, Field(gt=0, le=10**8)]
T = TypeVar("T")
PerModule = Annotated[dict[Module, T], Field(min_length=len(MODULES))]
Size = Literal[
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "shared_expert_size",
    "num_experts",
    "expert_size",
]
COUNTS: dict[Module, Size] = {  # what a module's channels are counted by
    "attention": "num_attention_heads", "mlp": "intermediate_size", "shared_expert": "shared_expert_size",
    "experts": "expert_size",
}  # fmt: skip
SPARE_NEURONS = 8  # written of an MLP that keeps none: torchao takes no single one, engines like rows of 16 bytes
AttentionUnit = Literal["kv_group", "query_head"]


def spare_units(module: Module, units: int, at_once: int = 1) -> int:
    """How many units of a module that keeps none are written, with their output cut off, since runtimes know no layer
    without any: the heads that go `at_once`, or some neurons. Experts go all.
    """
    if module == "experts":
        return 0
    return min(units, at_once if module == "attention" else SPARE_NEURONS)


class LayerShape(NamedTuple):
    """Sizes of one decoder layer; 0 where a module was pruned away whole, or never was."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    shared_expert_size: int = 0
    num_experts: int = 0
    expert_size: int = 0


OWN_SIZES = LayerShape._fields[:3]  # of every family; the others are written where a layer has some


class StoredWeights(Record):
    """What apply writes of a model where it is given no --dtype, for targets in bytes.

    `bytes` are those of all tensors; `itemsize` the least and the most bytes that a parameter of the decoder
    layers' projections takes; `output_biases` counts the layers whose output projection has a bias.
    """

    bytes: int
    itemsize: tuple[int, int]
    output_biases: PerModule[int]


class ModelShape(Record):
    """Where a model comes from and how its decoder is built.

    The scalar sizes are those of the architecture (config.json); `layers` gives each layer's own
    sizes, which differ where the model was pruned before. `weights` is None in older files. `attention_unit` is
    query_head where single query heads go and their keys and values stay; `unit_rows` are the rows of all producing
    projections that go with one unit where they are others than those of separate, equally wide ones, `unit_weights`
    all weights that do where producers read something else than the residual stream; `whole` says of modules whose
    units stay or go together alone why, and `every_expert` why no expert can go whole;
    `query_head_entries` what goes with a query head besides weights where it is more than a bias. Left out where None.
    """

    name: str
    revision: str | None = None
    fingerprint: str
    family: str
    num_layers: Extent
    hidden_size: Extent
    intermediate_size: Extent
    num_attention_heads: Extent
    num_key_value_heads: Extent
    head_dim: Extent
    parameters: int
    mlp_projections: int
    unit_biases: PerModule[int]
    layers: tuple[LayerShape, ...]
    weights: StoredWeights | None = None
    attention_unit: AttentionUnit | None = None
    unit_rows: PerModule[int] | None = None
    unit_weights: PerModule[int] | None = None
    whole: dict[Module, str] | None = None
    every_expert: str | None = None
    query_head_entries: int | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        added = ("attention_unit", "unit_rows", "unit_weights", "whole", "every_expert", "query_head_entries")
        usual = {key for key in added if getattr(self, key) is None}
        found = {key: value for key, value in write(self).items() if key not in usual}
        if not any(any(layer[3:]) for layer in self.layers):
            found["layers"] = tuple(layer[:3] for layer in self.layers)
        return found

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that its layers have, or some of them."""
        return tuple(module for module in EVERY_MODULE if module in self.unit_biases)

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that share one key/value head: 1 under multi-head attention; the first layer's that has some."""
        found = (layer.num_attention_heads // layer.num_key_value_heads for layer in self.layers if layer[1])
        return next(found, self.num_attention_heads // self.num_key_value_heads)

    def with_attention_unit(self, unit: AttentionUnit) -> Self:
        """The same model with single query heads, or KV groups, as attention's units.

        Raises UsageError where its layers do not allow it. Heads that share no keys are both.
        """
        groups = {layer.num_key_value_heads for layer in self.layers} - {0}
        if self.query_heads_per_group == 1 and self._is_even:
            return self
        if unit == "query_head" and len(groups) > 1:
            raise UsageError(f"--attention-unit query_head: the layers of {self.name} have unlike numbers of KV groups")
        if unit == "kv_group" and not self._is_even:
            raise UsageError(f"--attention-unit kv_group: the KV groups of {self.name} have unlike numbers of heads")
        if unit == (self.attention_unit or "kv_group"):
            return self
        biases, rows = self._attention_biases(unit), self.unit_rows
        changed = self.model_copy(update={"attention_unit": None if unit == "kv_group" else unit, "unit_rows": None})
        if rows:
            rows = rows | {"attention": changed.producer_rows("attention")}
        return changed.model_copy(update={"unit_rows": rows, "unit_biases": self.unit_biases | {"attention": biases}})

    @property
    def parts_groups(self) -> bool:
        """Whether single query heads can be units where heads share keys: all layers have equally many KV groups."""
        shared = any(layer.num_attention_heads > layer.num_key_value_heads for layer in self.layers)
        return shared and len({layer.num_key_value_heads for layer in self.layers} - {0}) == 1

    @property
    def _is_even(self) -> bool:
        """Whether all KV groups have equally many query heads."""
        return len({layer.num_attention_heads / layer.num_key_value_heads for layer in self.layers if layer[1]}) < 2

    def _attention_biases(self, unit: AttentionUnit) -> int:
        """What `unit_biases` says of attention where this is the unit."""
        now, heads, keys = self.unit_biases["attention"], self.query_heads_per_group, 2 * self.head_dim
        if unit == "query_head":
            own = self.query_head_entries
            return (self.head_dim if now >= self.head_dim else 0) if own is None else own
        return heads * now + (keys if now >= self.head_dim else 0)

    def unit(self, module: Module) -> str:
        """Name of the module's prunable unit (METHOD.md, Setting)."""
        if module != "attention":
            return "neuron"
        return self.attention_unit or ("head" if self.query_heads_per_group == 1 else "kv_group")

    def units(self, layer: int, module: Module) -> int:
        """How many units the module of this layer has."""
        sizes = self.layers[layer]
        if module != "attention":
            return getattr(sizes, COUNTS[module]) * (sizes.num_experts if module == "experts" else 1)
        return sizes.num_attention_heads if self.attention_unit == "query_head" else sizes.num_key_value_heads

    def groups(self, layer: int, module: Module) -> int:
        """How many units of a layer's module go at once, one of each part: query heads of the groups that share
        keys and values, neurons of experts.
        """
        if module == "experts":
            return max(self.layers[layer].num_experts, 1)
        shares = module == "attention" and self.attention_unit == "query_head"
        return max(self.layers[layer].num_key_value_heads, 1) if shares else 1

    def kept(self, layer: int, module: Module, units: NDArray[np.int64]) -> dict[Size, NDArray[np.bool_]]:
        """Which heads, or neurons, of a layer's module stay where these units do; of experts, which of them and which
        of all their neurons, one expert's after the other's.
        """
        sizes, stays = self.layers[layer], np.zeros(self.units(layer, module), dtype=bool)
        stays[units] = True
        if module in ("mlp", "shared_expert"):
            return {COUNTS[module]: stays}
        if module == "experts":
            experts: NDArray[np.bool_] = np.any(stays.reshape(sizes.num_experts, sizes.expert_size), axis=1)
            return {"num_experts": experts, "expert_size": stays}
        if self.attention_unit == "query_head":
            keys = np.full(sizes.num_key_value_heads, len(units) > 0)
            return {"num_attention_heads": stays, "num_key_value_heads": keys}
        return {"num_attention_heads": stays.repeat(self.query_heads_per_group), "num_key_value_heads": stays}

    def sizes_of(self, layer: int, module: Module, units: NDArray[np.int64]) -> dict[Size, int]:
        """The sizes of a layer's module where these units stay, equally many in every expert that does."""
        found: dict[Size, int] = {size: int(stays.sum()) for size, stays in self.kept(layer, module, units).items()}
        if module == "experts":
            found["expert_size"] //= max(found["num_experts"], 1)
        return found

    def written(self, layer: int, module: Module, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """The units that files hold where these stay: of a module that keeps none the first spare ones, a head of each
        part, or all heads where none goes alone.
        """
        if len(units) or not (count := self.units(layer, module)):
            return units
        parts = self.groups(layer, module) if module in self.prunable else count
        spare = spare_units(module, count, parts)
        return np.arange(spare) * (count // parts if module == "attention" else 1)

    def kept_of_one(self, module: Module) -> dict[Size, int]:
        """How many of what go with one unit."""
        if module != "attention":
            return {COUNTS[module]: 1}
        if self.attention_unit == "query_head":
            return {"num_attention_heads": 1}
        return {"num_attention_heads": self.query_heads_per_group, "num_key_value_heads": 1}

    @property
    def shared_entries(self) -> int:
        """Weights and biases of a layer's keys and values, which go with the last of its query heads alone."""
        if self.attention_unit != "query_head":
            return 0
        rows = 2 * self.head_dim * max(layer.num_key_value_heads for layer in self.layers)
        return rows * (self.hidden_size + (self.unit_biases["attention"] >= self.head_dim))

    def channels(self, layer: int, module: Module) -> int:
        """Channels of the output projection's input in this layer."""
        return self.units(layer, module) * self.channels_per_unit(module)

    def channels_per_unit(self, module: Module) -> int:
        """Channels of the output projection's input that one unit owns."""
        if module != "attention":
            return 1
        return self.head_dim * (1 if self.attention_unit == "query_head" else self.query_heads_per_group)

    def unit_parameters(self, module: Module) -> int:
        """Weights that go with one unit (METHOD.md, Setting): its rows of the producers, its columns of the output.

        Biases of the producing projections are not counted here; see `unit_biases`.
        """
        if self.unit_weights:
            return self.unit_weights[module]
        return (self.producer_rows(module) + self.channels_per_unit(module)) * self.hidden_size

    def producer_rows(self, module: Module) -> int:
        """Rows of all producing projections that go with one unit: their biases' entries where they have some."""
        if self.unit_rows:
            return self.unit_rows[module]
        if module != "attention":
            return self.mlp_projections - 1
        return (1 if self.attention_unit == "query_head" else self.query_heads_per_group + 2) * self.head_dim

    @property
    def prunable(self) -> tuple[Module, ...]:
        """The modules whose units can go one by one."""
        return tuple(module for module in self.modules if module not in (self.whole or {}))

    @property
    def prunable_weights(self) -> int:
        """Weights of all units of the whole model that can go one by one."""
        return sum(self.prunable_layer(i) for i in range(self.num_layers))

    def prunable_layer(self, layer: int) -> int:
        """Weights of all units of a layer's prunable modules."""
        return sum(self.module_weights(layer, module) for module in self.prunable)

    def module_weights(self, layer: int, module: Module) -> int:
        """Weights of all units of a layer's module."""
        return self.units(layer, module) * self.weights_of_unit(layer, module)

    def weights_of_unit(self, layer: int, module: Module) -> int:
        """Weights that go with one unit of this layer: `unit_parameters`, wherever units are single ones."""
        return self.unit_parameters(module)
