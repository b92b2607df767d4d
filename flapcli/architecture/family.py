"""What flap knows of each architecture: one JSON description a family, and the reader of it.

A description says where sizes stand in config.json, which projections produce a module's channels and
which one consumes them, and which tensors stay whole; what it leaves out is that of the family that it is `like`.
Adding a family that fits adds a file.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from flapcli.architecture.flap_section import FlapSection
from flapcli.architecture.shape import LayerShape, Module, Size
from flapcli.errors import FlapError
from flapcli.storage.record import Record

FAMILIES = Path(__file__).parent / "families"
MAX_LAYERS, MAX_SIZE = 10**5, 10**8


def _is_size(name: str, value: object) -> bool:
    """Whether config.json gives what can be a model's size, or nothing."""
    return value is None or (type(value) is int and 0 < value <= (MAX_LAYERS if name == "num_layers" else MAX_SIZE))


class ModuleDescription(Record):
    """One of a layer's two modules, by tensor prefixes below the layer's.

    `producers` maps each projection that produces the module's channels to the size that its rows
    follow; `output` is the projection whose columns are the channels.
    """

    output: str
    producers: dict[str, Size]


class GgufExport(Record):
    """The architecture of llama.cpp that has per-layer sizes and computes what the family computes.

    `permuted` are the projections whose rows its rotation wants interleaved; `requires` maps keys of
    config.json to the values for which the two compute the same (null: the key is missing or null).
    """

    architecture: str
    permuted: list[str]
    requires: dict[str, list[str | bool | None]]


class GgufDescription(Record):
    """How llama.cpp stores the family: its name of the architecture and the projections whose rows it permutes.

    `config` maps its metadata's keys, below the architecture's name, to those of config.json that they fill. `export`
    is how a pruned model is written, or the reason why it can't be.
    """

    architecture: str
    permuted: list[str]
    config: dict[str, str]
    export: GgufExport | str = "flap knows no architecture of llama.cpp with per-layer sizes for it"


class Family(Record):
    """A model family. `sizes` maps our names of sizes to config.json's keys.

    `decoder` and `layer` are prefixes of tensor names, the latter with the layer's index. `between_modules` is the
    layer's submodule whose input is the residual stream between attention and MLP. `per_layer_lists` are the
    configuration's lists of one entry for each layer, `leading_layer_counts` its numbers of first layers that differ
    from the rest: what must follow where whole layers are dropped. `untouched_in_layer` (below the layer's prefix) and
    `outside_layers` hold tensors that pruning leaves whole; names that end in `ignored_suffixes` no runtime reads.
    `bias_options` maps a module to the configuration's switch that gives all its projections biases.
    """

    name: str
    covers: str
    model_type: str
    architecture: str
    sizes: dict[str, str]
    decoder: str
    layer: str
    attention: ModuleDescription
    mlp: ModuleDescription
    between_modules: str
    per_layer_lists: list[str]
    leading_layer_counts: list[str]
    bias_options: dict[Module, str]
    untouched_in_layer: list[str]
    ignored_suffixes: list[str]
    final_norm: str
    head: str
    outside_layers: list[str]
    gguf: GgufDescription

    def module(self, module: Module) -> ModuleDescription:
        return self.attention if module == "attention" else self.mlp

    def output(self, layer: int, module: Module) -> str:
        """Full prefix of a module's output projection, such as `model.layers.0.mlp.down_proj`."""
        return f"{self.layer.format(i=layer)}.{self.module(module).output}"

    def read_sizes(self, config: dict[str, Any]) -> dict[str, int]:
        """Sizes of the architecture from config.json, defaults of transformers' configs filled in.

        Raises FlapError that lists every missing size, and every value that is none.
        """
        sizes = {name: config.get(key) for name, key in self.sizes.items()}
        odd = [f"{self.sizes[name]} is {value!r:.80}" for name, value in sizes.items() if not _is_size(name, value)]
        if odd:
            raise FlapError(f"config.json of a {self.name} model: {', '.join(odd)}, where a whole number is wanted")
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
        if sizes["head_dim"] is None and sizes["hidden_size"] and sizes["num_attention_heads"]:
            sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        missing = [self.sizes[name] for name, value in sizes.items() if value is None]
        if missing:
            raise FlapError(f"config.json of a {self.name} model lacks {', '.join(missing)}")
        return {name: value for name, value in sizes.items() if value is not None}

    def read_layers(self, config: dict[str, Any], flap: FlapSection | None) -> tuple[LayerShape, ...]:
        """Each layer's own sizes: those under `flap` where the model was pruned, else the architecture's."""
        sizes = self.read_sizes(config)
        count = sizes["num_layers"]
        if flap is None:
            return (LayerShape(*(sizes[size] for size in LayerShape._fields)),) * count
        layers = tuple(flap.layers())
        if len(layers) != count:
            raise FlapError(f"config.json: the per-layer sizes under `flap` are not {count} values each")
        return layers


@cache
def families() -> dict[str, Family]:
    """All descriptions in the folder families/ by the model_type they read."""
    found = [Family.model_validate(_description(path.stem)) for path in sorted(FAMILIES.glob("*.json"))]
    return {family.model_type: family for family in found}


def _description(name: str) -> dict[str, Any]:
    """A file of families/, over that of the family that it is `like`; `gguf` is taken key by key."""
    own = json.loads((FAMILIES / f"{name}.json").read_bytes())
    base = _description(own.pop("like")) if "like" in own else {}
    return base | own | {"gguf": base.get("gguf", {}) | own["gguf"]}


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json. Raises FlapError for an unknown one, never guesses."""
    model_type = config.get("model_type")
    if family := families().get(str(model_type)):
        return family
    known = ", ".join(families())
    raise FlapError(f"{where}: model_type {json.dumps(model_type):.80} is not supported; flap prunes: {known}")


def family_of_gguf(architecture: str, where: str) -> Family:
    """The family of a GGUF file's `general.architecture`; the first, where several share one (llama)."""
    for family in families().values():
        if family.gguf.architecture == architecture:
            return family
    known = ", ".join(sorted({family.gguf.architecture for family in families().values()}))
    raise FlapError(f"{where}: GGUF architecture {architecture!r:.80} is not supported; flap reads: {known}")
