"""What flap knows of each architecture: one JSON description a family, and the reader of it.

A description says where sizes stand in config.json, which projections produce a module's channels and
which one consumes them, and which tensors stay whole. Adding a family that fits adds a file.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from flapcli.errors import FlapError
from flapcli.shape import LayerShape, Module, Size


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModuleDescription(_Description):
    """One of a layer's two modules, by tensor prefixes below the layer's.

    `producers` maps each projection that produces the module's channels to the size that its rows
    follow; `output` is the projection whose columns are the channels.
    """

    output: str
    producers: dict[str, Size]


class GgufExport(_Description):
    """The architecture of llama.cpp that has per-layer sizes and computes what the family computes.

    `permuted` are the projections whose rows its rotation wants interleaved; `requires` maps keys of
    config.json to the values for which the two compute the same (null: the key is missing or null).
    """

    architecture: str
    permuted: list[str]
    requires: dict[str, list[str | bool | None]]


class GgufDescription(_Description):
    """How llama.cpp stores the family.

    Its architecture's name, the projections whose rows it permutes, and which of config.json's keys its
    metadata fill (prefixed by the architecture's name). `export` is how a pruned model is written, or the
    reason why it can't be.
    """

    architecture: str
    permuted: list[str]
    config: dict[str, str]
    export: GgufExport | str = "flap knows no architecture of llama.cpp with per-layer sizes for it"


class Family(_Description):
    """A model family. `sizes` maps our names of sizes to config.json's keys.

    `middle` is the layer's submodule whose input is the residual stream between attention and MLP.
    `per_layer` are the configuration's lists of one entry for each layer, `leading` its numbers of first layers
    that differ from the rest: what must follow where whole layers are dropped.
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
    middle: str
    per_layer: list[str]
    leading: list[str]
    bias_options: dict[Module, str]
    uncut: list[str]
    dropped: list[str]
    final_norm: str
    head: str
    outside: list[str]
    gguf: GgufDescription

    def module(self, module: Module) -> ModuleDescription:
        return self.attention if module == "attention" else self.mlp

    def output(self, layer: int, module: Module) -> str:
        """Full prefix of a module's output projection, such as `model.layers.0.mlp.down_proj`."""
        return f"{self.layer.format(i=layer)}.{self.module(module).output}"

    def read_sizes(self, config: dict[str, Any]) -> dict[str, int]:
        """Sizes of the architecture from config.json, defaults of transformers' configs filled in.

        Raises FlapError that lists every missing size.
        """
        sizes = {name: config.get(key) for name, key in self.sizes.items()}
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
        if sizes["head_dim"] is None and sizes["hidden_size"] and sizes["num_attention_heads"]:
            sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        missing = [self.sizes[name] for name, value in sizes.items() if value is None]
        if missing:
            raise FlapError(f"config.json of a {self.name} model lacks {', '.join(missing)}")
        return {name: int(value) for name, value in sizes.items() if value is not None}

    def read_layers(self, config: dict[str, Any]) -> tuple[LayerShape, ...]:
        """Each layer's own sizes: those under `flap` where the model was pruned, else the architecture's."""
        sizes = self.read_sizes(config)
        count = sizes["num_layers"]
        pruned = config.get("flap", {})
        columns = [pruned.get(size) or [sizes[size]] * count for size in LayerShape._fields]
        if any(len(column) != count for column in columns):
            raise FlapError(f"config.json: the per-layer sizes under `flap` are not {count} values each")
        return tuple(LayerShape(*row) for row in zip(*columns, strict=True))


@cache
def families() -> dict[str, Family]:
    """All descriptions of this folder by the model_type they read."""
    found = [Family.model_validate_json(path.read_bytes()) for path in sorted(Path(__file__).parent.glob("*.json"))]
    return {family.model_type: family for family in found}


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json. Raises FlapError for an unknown one, never guesses."""
    model_type = config.get("model_type")
    family = families().get(str(model_type))
    if family is None:
        known = ", ".join(families())
        raise FlapError(f"{where}: model_type {json.dumps(model_type)} is not supported; flap prunes: {known}")
    return family


def family_of_gguf(architecture: str, where: str) -> Family:
    """The family of a GGUF file's `general.architecture`; the first, where several share one (llama)."""
    for family in families().values():
        if family.gguf.architecture == architecture:
            return family
    known = ", ".join(sorted({family.gguf.architecture for family in families().values()}))
    raise FlapError(f"{where}: GGUF architecture {architecture!r} is not supported; flap reads: {known}")
