"""What every kind of checkpoint offers: sizes and fingerprint from headers, tensors one by one."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.checkpoint.source import Hub
from flapcli.errors import FlapError
from flapcli.families import Family, family_of
from flapcli.safetensors_io import ITEM_SIZE, TensorSpec
from flapcli.shape import MODULES, ModelShape, Module, StoredWeights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# What of config.json decides the function that the weights compute.
ARCHITECTURE_KEYS = [
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
]  # fmt: skip


class Checkpoint(ABC):
    """A checkpoint on disk.

    `name` finds it again (hub id, absolute path or `demo`), `path` is its folder or file here.
    """

    def __init__(self, name: str, path: Path, hub: Hub) -> None:
        self.name, self.path, self.hub = name, path, hub

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json, or what it would be."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what identifies the model without reading weights (DESIGN 1.2)."""

    @property
    @abstractmethod
    def stored(self) -> dict[str, TensorSpec]:
        """Every tensor by its transformers name, from headers alone."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors as stored."""

    @property
    @abstractmethod
    def stored_as(self) -> str:
        """The type that most of the weights are stored in, such as BF16 or Q4_1."""

    @property
    @abstractmethod
    def license(self) -> str | None:
        """The licence's id as its publisher states it, where one is stated."""

    @abstractmethod
    def read(self, name: str) -> "torch.Tensor":
        """One tensor, on the CPU, as stored (quantised ones dequantised to float32)."""

    @abstractmethod
    def load_tokenizer(self) -> "PreTrainedTokenizerBase": ...

    @abstractmethod
    def load_config(self) -> "PreTrainedConfig":
        """The transformers configuration object."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.config, self.name)

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors that count: without a tied head's copy and without what no runtime reads."""
        tied = f"{self.family.head}.weight" if self.config.get("tie_word_embeddings") else None
        dropped = tuple(f".{suffix}" for suffix in self.family.dropped)
        counted = {n: s for n, s in self.stored.items() if n != tied and not n.endswith(dropped)}
        for name, spec in counted.items():
            if spec.dtype.startswith("F8"):
                raise FlapError(
                    f"{self.name}: tensor {name} is float8 ({spec.dtype}), which flap does not prune: give the "
                    "checkpoint in bfloat16, float16 or float32 (dequantise it first)"
                )
        return counted

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes for planning, checked against the tensors. Raises FlapError naming all that do not fit."""
        sizes = self.family.read_sizes(self.config)
        shape = ModelShape(
            name=self.name,
            revision=self.hub.revision,
            fingerprint=self.fingerprint,
            family=self.family.name,
            parameters=sum(prod(spec.shape) for spec in self.tensors.values()),
            mlp_projections=len(self.family.mlp.producers) + 1,
            unit_biases={module: self._unit_biases(module, sizes) for module in MODULES},
            layers=self.family.read_layers(self.config),
            weights=self._stored_weights(sizes["num_layers"]),
            **sizes,
        )
        if wrong := list(self._misfits(shape)):
            raise FlapError(
                f"{self.name}: {'; '.join(wrong[:4])}" + (f" and {len(wrong) - 4} more" if wrong[4:] else "")
            )
        return shape

    def _stored_weights(self, num_layers: int) -> StoredWeights:
        """Bytes of all tensors that count, as apply writes them by default."""
        prefix = self.family.layer.split("{i}")[0]
        layers = [spec for name, spec in self.tensors.items() if name.startswith(prefix) and len(spec.shape) == 2]
        sizes = {ITEM_SIZE[spec.dtype] for spec in layers or self.tensors.values()}
        outputs = {m: [f"{self.family.output(i, m)}.bias" for i in range(num_layers)] for m in MODULES}
        return StoredWeights(
            bytes=sum(spec.nbytes for spec in self.tensors.values()),
            itemsize=(min(sizes), max(sizes)),
            output_biases={m: sum(name in self.tensors for name in names) for m, names in outputs.items()},
        )

    def _unit_biases(self, module: Module, sizes: dict[str, int]) -> int:
        """Bias entries of the producing projections that go with one unit."""
        group = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
        rows = {
            "num_attention_heads": group * sizes["head_dim"],
            "num_key_value_heads": sizes["head_dim"],
            "intermediate_size": 1,
        }
        prefix = self.family.layer.split("{i}")[0]
        biased = {n for n in self.tensors if n.startswith(prefix) and n.endswith(".bias")}
        producers = self.family.module(module).producers
        return sum(rows[size] for p, size in producers.items() if any(n.endswith(f"{p}.bias") for n in biased))

    def _misfits(self, shape: ModelShape) -> Iterator[str]:
        """What is missing, unknown, or of a shape that the configuration does not say."""
        expected = self.expected_shapes(shape)
        for name, want in expected.items():
            spec = self.tensors.get(name)
            if spec is None and not name.endswith(".bias"):
                yield f"tensor {name} is missing"
            elif spec is not None and spec.shape != want:
                yield f"tensor {name} has shape {list(spec.shape)}, expected {list(want)}"
        whole = {f"{self.family.layer.format(i=i)}.{p}" for i in range(shape.num_layers) for p in self.family.uncut}
        whole.update(self.family.outside)
        for name in self.tensors:
            if name not in expected and name.rpartition(".")[0] not in whole:
                yield f"tensor {name} is not known to family {self.family.name}"

    def expected_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights and possible biases of the projections that pruning touches."""
        expected: dict[str, tuple[int, ...]] = {}
        for i, layer in enumerate(shape.layers):
            prefix = self.family.layer.format(i=i)
            for module in MODULES:
                description = self.family.module(module)
                channels = shape.units(i, module) * shape.channels_per_unit(module)
                expected[f"{prefix}.{description.output}.bias"] = (shape.hidden_size,)
                if channels == 0:  # pruned away whole: at most the bias is there
                    continue
                expected[f"{prefix}.{description.output}.weight"] = (shape.hidden_size, channels)
                for producer, size in description.producers.items():
                    rows = getattr(layer, size) * shape.rows_per(size)
                    expected[f"{prefix}.{producer}.weight"] = (rows, shape.hidden_size)
                    expected[f"{prefix}.{producer}.bias"] = (rows,)
        return expected


def architecture_digest(config: dict[str, Any]) -> "hashlib._Hash":
    """A SHA-256 fed with the architecture fields of config.json; weight headers are added by the caller."""
    fields = {key: config[key] for key in ARCHITECTURE_KEYS if key in config}
    # Pruned folders of equal sizes differ by the plan that they were made by, which stands under `flap`.
    fields["flap"] = config.get("flap")
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
