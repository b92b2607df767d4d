"""A checkpoint as its family's description reads it: settings, sizes, which rows are whose, the tensors that count."""

import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.architecture.family import Family, family_of
from flapcli.architecture.flap_section import FlapSection
from flapcli.architecture.rows import RowMap, Symbols, evaluate
from flapcli.architecture.shape import COUNTS, AttentionUnit, LayerShape, Module
from flapcli.checkpoints.locate import Hub
from flapcli.errors import FlapError
from flapcli.storage.safetensors_file import TensorSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FEW_LAYERS = 1000  # up to which missing tensors are named one by one


class Described(ABC):
    """A checkpoint on disk.

    `name` finds it again (hub id, absolute path or `demo`), `path` is its folder or file here. `attention_unit` is
    what its shape shall have, None what suits it: single query heads where `prefers_query_heads` and its layers allow
    them. Both are to be set before the shape is asked for.
    """

    attention_unit: AttentionUnit | None = None
    prefers_query_heads = False

    def __init__(self, name: str, path: Path, hub: Hub) -> None:
        self.name, self.path, self.hub = name, path, hub

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json, or what it would be."""

    @property
    def carried(self) -> dict[str, TensorSpec]:
        """Tensors of other parts than the model, by their names in the files, which `read` takes too."""
        return {}

    @property
    @abstractmethod
    def stored(self) -> dict[str, TensorSpec]:
        """Every tensor by its transformers name, from headers alone."""

    @abstractmethod
    def read(self, name: str) -> "torch.Tensor":
        """One tensor, on the CPU, as stored (quantised ones dequantised to float32)."""

    @property
    @abstractmethod
    def generation(self) -> dict[str, Any]:
        """generation_config.json, empty where there is none. Raises FlapError for a broken one."""

    @abstractmethod
    def load_config(self) -> "PreTrainedConfig":
        """The transformers configuration object."""

    @cached_property
    def _known(self) -> "PreTrainedConfig":
        """The configuration object, to be read alone."""
        return self.load_config()

    def setting(self, key: str) -> Any:
        """A key of config.json, or what the configuration's class of transformers makes of one that it lacks."""
        return self.config[key] if key in self.config else getattr(self._known, key, None)

    def key_of(self, key: str) -> str:
        """The name under which config.json has a setting, which its class of transformers may know by two."""
        names: dict[str, str] = self._known.attribute_map if key not in self.config else {}
        others = [names.get(key), *(name for name, other in names.items() if other == key)]
        return next((name for name in others if name in self.config), key)

    @cached_property
    def family(self) -> Family:
        return family_of(self.config.get("model_type"), self.setting, self.name)

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one matrix."""
        return bool(self.setting("tie_word_embeddings"))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Sizes of the architecture. Raises FlapError where the configuration does not say them."""
        axis = 0 if self.family.transposed else 1
        name = f"{self.family.output(0, 'mlp')}.weight"
        return self.family.read_sizes(self.setting, self.stored[name].shape[axis] if name in self.stored else None)

    def rows(self, module: Module) -> dict[str, RowMap]:
        """Which rows of the module's producing projections, and of its unit tensors, belong to what."""
        return {name: self._row_map(symbols) for name, symbols in self.family.module(module).tensors.items()}

    def _row_map(self, symbols: Symbols) -> RowMap:
        return RowMap.of(symbols, self.values(*(symbol.partition(":")[2] for block in symbols for symbol in block)))

    def values(self, *expressions: str) -> dict[str, int]:
        """The sizes, and what else of the configuration these expressions name."""
        named = {name for expression in expressions for name in re.findall(r"[a-z_]\w*", expression)}
        return self.sizes | {name: self.setting(name) or 0 for name in named - self.sizes.keys()}

    def input_width(self, module: Module, producer: str) -> int:
        """Columns of a producing projection, which reads the residual stream unless the description says otherwise."""
        expression = self.family.module(module).inputs.get(producer, "hidden_size")
        return evaluate(expression, self.values(expression))

    def lacks(self, layer: int, module: Module) -> bool:
        """Whether a layer, of a family with experts, never had this module."""
        description = self.family.module(module)
        prefix = f"{self.family.layer.format(i=layer)}."
        names = (
            description.weight(description.output),
            description.bias(description.output),
            *description.unit_tensors,
        )
        return self.family.experts is not None and not any(f"{prefix}{name}" in self.stored for name in names)

    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Each layer's sizes; where there are experts, from its tensors."""
        layers = self.family.read_layers(self.sizes, self.flap)
        if self.flap or self.family.experts is None:
            return layers
        return tuple(layer._replace(**self._widths(i)) for i, layer in enumerate(layers))

    def _widths(self, layer: int) -> dict[str, int]:
        found: dict[str, int] = {"intermediate_size": 0}
        for module in self.family.modules[1:]:
            if spec := self.tensors.get(self.family.output_weight(layer, module)):
                axis = 1 if self.family.module(module).transposed or self.family.transposed else -1
                found[COUNTS[module]] = spec.shape[0 if self.family.transposed else axis]
                if module == "experts":
                    found["num_experts"] = spec.shape[0]
        return found

    @cached_property
    def flap(self) -> FlapSection | None:
        """What flap wrote into config.json where it pruned this checkpoint. Raises FlapError for a broken section."""
        return FlapSection.of(self.config, self.name)

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors that count: without a tied head's copy and what no runtime reads."""
        tied = f"{self.family.head}.weight" if self.tied else None
        dropped = tuple(f".{suffix}" for suffix in self.family.ignored_suffixes)
        counted = {n: s for n, s in self.stored.items() if n != tied and not n.endswith(dropped)}
        if not counted:
            raise FlapError(f"{self.name} holds no tensors of a model: give the folder that save_pretrained writes")
        for name, spec in counted.items():
            if spec.dtype.startswith("F8"):
                raise FlapError(
                    f"{self.name}: tensor {name} is float8 ({spec.dtype}), which flap does not prune: give the "
                    "checkpoint in bfloat16, float16 or float32 (dequantise it first)"
                )
        return counted

    def refuse_layers(self, layers: int, tensors: int) -> None:
        """Raise FlapError for more layers than there are tensors, before anything is reserved for them."""
        if layers > max(tensors, FEW_LAYERS):
            raise FlapError(f"{self.name}: its configuration says {layers:,} layers, and it holds {tensors:,} tensors")
