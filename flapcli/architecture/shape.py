"""The sizes of a model that planning needs, without the model."""

from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import Field

from flapcli.storage.record import Record

Module = Literal["attention", "mlp"]
MODULES: tuple[Module, Module] = ("attention", "mlp")
Extent = Annotated[int, Field(gt=0, le=10**8)]
T = TypeVar("T")
PerModule = Annotated[dict[Module, T], Field(min_length=len(MODULES))]
Size = Literal["num_attention_heads", "num_key_value_heads", "intermediate_size"]


class LayerShape(NamedTuple):
    """Sizes of one decoder layer; 0 where a module was pruned away whole."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


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
    sizes, which differ where the model was pruned before. `weights` is None in older files.
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

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that share one key/value head: 1 under multi-head attention."""
        return self.num_attention_heads // self.num_key_value_heads

    def unit(self, module: Module) -> str:
        """Name of the module's prunable unit (METHOD.md, Setting)."""
        if module == "mlp":
            return "neuron"
        return "head" if self.query_heads_per_group == 1 else "kv_group"

    def units(self, layer: int, module: Module) -> int:
        """How many units the module of this layer has."""
        sizes = self.layers[layer]
        return sizes.intermediate_size if module == "mlp" else sizes.num_key_value_heads

    def channels_per_unit(self, module: Module) -> int:
        """Channels of the output projection's input that one unit owns."""
        return 1 if module == "mlp" else self.query_heads_per_group * self.head_dim

    def rows_per(self, size: Size) -> int:
        """Rows of a producing projection for one of what `size` counts: a head's channels, or a neuron."""
        return 1 if size == "intermediate_size" else self.head_dim

    def unit_parameters(self, module: Module) -> int:
        """Weights that go with one unit (METHOD.md, Setting): its rows of the producers, its columns of the output.

        Biases of the producing projections are not counted here; see `unit_biases`.
        """
        return (self.producer_rows(module) + self.channels_per_unit(module)) * self.hidden_size

    def producer_rows(self, module: Module) -> int:
        """Rows of all producing projections that go with one unit: their biases' entries where they have some."""
        if module == "mlp":
            return self.mlp_projections - 1
        return (self.query_heads_per_group + 2) * self.head_dim

    @property
    def prunable_weights(self) -> int:
        """Weights of all units of the whole model."""
        return sum(self.prunable_layer(i) for i in range(self.num_layers))

    def prunable_layer(self, layer: int) -> int:
        """Weights of all units of both modules of a layer."""
        return sum(self.units(layer, module) * self.unit_parameters(module) for module in MODULES)
