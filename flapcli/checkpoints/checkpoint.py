"""What every kind of checkpoint offers: sizes and fingerprint from headers, tensors one by one."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.architecture.family import MAX_SIZE, SIZES, Family, family_of, renamed
from flapcli.architecture.flap_section import FlapSection, MadeBy
from flapcli.architecture.rows import RowMap, Symbols, evaluate
from flapcli.architecture.shape import AttentionUnit, LayerShape, ModelShape, Module, Size, StoredWeights
from flapcli.architecture.wrapper import Wrapper
from flapcli.checkpoints.companion_files import decides_tokens
from flapcli.checkpoints.locate import Hub
from flapcli.errors import FlapError, UsageError, first_line
from flapcli.storage.dtypes import CODES, ITEM_SIZE
from flapcli.storage.hashing import files_sha256
from flapcli.storage.json_file import lfs_hint
from flapcli.storage.safetensors_file import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


FEW_LAYERS = 1000  # up to which missing tensors are named one by one


class Checkpoint(ABC):
    """A checkpoint on disk.

    `name` finds it again (hub id, absolute path or `demo`), `path` is its folder or file here. `attention_unit` is
    what its shape shall have, None what suits it; it is to be set before the shape is asked for.
    """

    attention_unit: AttentionUnit | None = None

    def __init__(self, name: str, path: Path, hub: Hub) -> None:
        self.name, self.path, self.hub = name, path, hub

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json, or what it would be."""

    @property
    def config_in_files(self) -> dict[str, Any]:
        """config.json as it is, where the model is made of files that are of another kind."""
        return self.config

    @property
    def wrapper(self) -> Wrapper | None:
        """What the model is a part of in the files, if of anything."""
        return None

    @property
    def carried(self) -> dict[str, TensorSpec]:
        """Tensors of other parts than the model, by their names in the files, which `read` takes too."""
        return {}

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what identifies the model without reading weights."""

    @property
    @abstractmethod
    def stored(self) -> dict[str, TensorSpec]:
        """Every tensor by its transformers name, from headers alone."""

    @property
    @abstractmethod
    def _stored_sizes(self) -> list[tuple[str, int]]:
        """Type (such as BF16 or Q4_1) and bytes of every tensor as stored."""

    @property
    @abstractmethod
    def license(self) -> str | None:
        """The licence's id as its publisher states it, where one is stated."""

    @abstractmethod
    def read(self, name: str) -> "torch.Tensor":
        """One tensor, on the CPU, as stored (quantised ones dequantised to float32)."""

    @property
    def is_converted(self) -> bool:
        """Whether transformers can't take the files as they are, but the tensors that are made of them."""
        return self.path.is_file()

    @property
    def name_in_files(self) -> dict[str, str]:
        """What the source's files call a tensor, by its transformers name; none where they are not to be kept."""
        return {name: name for name in self.stored}

    @property
    def experts_in_files(self) -> dict[str, list[list[str]]]:
        """Tensors of all experts that the source's files hold expert by expert: their names there, in parts."""
        return {}

    def own_name(self, theirs: str) -> str:
        """The model's name of a tensor of its own that files have under another one."""
        patterns = self.wrapper.names if self.wrapper else self.family.stored_names
        return renamed(theirs, patterns)

    def read_output(self, layer: int, module: Module) -> "torch.Tensor":
        """The weight of a module's output projection, (out, channels), all experts' side by side."""
        return self.as_matrix(module, self.read(self.family.output_weight(layer, module))).contiguous()

    def as_matrix(self, module: Module, stored: "torch.Tensor") -> "torch.Tensor":
        """A module's output projection as it is stored, (out, channels), all experts' side by side."""
        if self.family.module(module).of_experts:
            return (stored if self.family.module(module).transposed else stored.mT).flatten(0, 1).T
        return stored.T if self.family.transposed else stored

    @property
    @abstractmethod
    def generation(self) -> dict[str, Any]:
        """generation_config.json, empty where there is none. Raises FlapError for a broken one."""

    @property
    @abstractmethod
    def may_open_texts(self) -> bool:
        """Whether its tokenizer may put tokens before a text: only loading it tells, unless its files rule it out."""

    @abstractmethod
    def _load_tokenizer(self) -> "PreTrainedTokenizerBase": ...

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Raises FlapError where there is none, or none that can be loaded."""
        self.shape  # noqa: B018  what the configuration says is checked before transformers reads it
        try:
            return self._load_tokenizer()
        except Exception as error:  # what broken files raise is of every kind
            hint = lfs_hint(*(self.path.glob("tokenizer*") if self.path.is_dir() else []))
            raise FlapError(f"{self.name}: its tokenizer can't be loaded: {first_line(error)}{hint}") from error

    @abstractmethod
    def load_config(self) -> "PreTrainedConfig":
        """The transformers configuration object."""

    @property
    def companions(self) -> dict[str, Path]:
        """What lies beside the weights and goes with them, by relative name; none where one file holds all."""
        return {}

    @property
    def companions_sha256(self) -> str | None:
        """Hash of all companions; None where the fingerprint says it all."""
        return files_sha256(self.path, self.companions.values()) if self.companions else None

    def tokenizer_sha256(self, chats: bool) -> str | None:
        """Hash of the companions that decide token ids, of `chats` too; None where the fingerprint says it all."""
        files = [path for name, path in self.companions.items() if decides_tokens(name, chats)]
        return files_sha256(self.path, files) if files else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as stored."""
        return sum(nbytes for _, nbytes in self._stored_sizes)

    @property
    def stored_as(self) -> str:
        """The type that most of the weights are stored in, such as BF16 or Q4_1."""
        sizes: Counter[str] = Counter()
        for dtype, nbytes in self._stored_sizes:
            sizes[dtype] += nbytes
        return max(sizes, key=sizes.__getitem__)

    def setting(self, key: str) -> Any:
        """A key of config.json, or what the configuration's class of transformers makes of one that it lacks."""
        return self.config[key] if key in self.config else getattr(self.load_config(), key, None)

    def key_of(self, key: str) -> str:
        """The name under which config.json has a setting, which its class of transformers may know by two."""
        names: dict[str, str] = self.load_config().attribute_map if key not in self.config else {}
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

    def _input_width(self, module: Module, producer: str) -> int:
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

    def _layers(self) -> tuple[LayerShape, ...]:
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
                size = {"mlp": "intermediate_size", "shared_expert": "shared_expert_size"}.get(module, "expert_size")
                found[size] = spec.shape[0 if self.family.transposed else axis]
                if module == "experts":
                    found["num_experts"] = spec.shape[0]
        return found

    @cached_property
    def flap(self) -> FlapSection | None:
        """What flap wrote into config.json where it pruned this checkpoint. Raises FlapError for a broken section."""
        return FlapSection.of(self.config, self.name)

    @property
    def made_by(self) -> MadeBy | None:
        """What this checkpoint was pruned from and how; None of one that was not."""
        return self.flap.made_by if self.flap else None

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors that count: without a tied head's copy, what no runtime reads, and an emptied module's mark."""
        tied = f"{self.family.head}.weight" if self.tied else None
        dropped = tuple(f".{suffix}" for suffix in self.family.ignored_suffixes)
        counted = {n: s for n, s in self.stored.items() if n != tied and not n.endswith(dropped) and 0 not in s.shape}
        if not counted:
            raise FlapError(f"{self.name} holds no tensors of a model: give the folder that save_pretrained writes")
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
        self._refuse_quantised()
        self._refuse_odd_settings()
        sizes = self.sizes
        self._refuse_layers(sizes["num_layers"], len(self.stored))
        layers = self._layers()
        shape = ModelShape(
            name=self.name,
            revision=self.hub.revision,
            fingerprint=self.fingerprint,
            family=self.family.name,
            parameters=sum(prod(spec.shape) for spec in (*self.tensors.values(), *self.carried.values())),
            mlp_projections=self._rows_of_one("mlp", "intermediate_size") + 1,
            unit_biases=dict.fromkeys(self.family.modules, 0),
            layers=layers,
            weights=self._stored_weights(sizes["num_layers"]),
            attention_unit=None,
            unit_rows=None,
            unit_weights=None,
            whole={m: why for m in self.family.modules if (why := self.family.module(m).stays_whole)} or None,
            every_expert=self.family.experts.every_expert if self.family.experts else None,
            **{name: sizes[name] for name in SIZES},
        )
        shape = self._with_units(shape)
        self._refuse_untied()
        if wrong := list(self._misfits(shape)):
            more = f" and {len(wrong) - 4} more" if wrong[4:] else ""
            raise FlapError(f"{self.name}: {'; '.join(wrong[:4])}{more}")
        return shape

    def refuse_ids(self, ids: "NDArray[np.int64]") -> None:
        """Raise FlapError for tokens that the embedding has no row for."""
        if ids.size and (largest := int(ids.max())) >= self.vocabulary:
            raise FlapError(
                f"{self.name}: its tokenizer gives the id {largest}, and its embedding has only {self.vocabulary} "
                "rows: give the tokenizer that belongs to it, or resize the embedding (resize_token_embeddings)"
            )

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: one for each token that a model can read."""
        self.shape  # noqa: B018  which refuses a checkpoint without one
        return self.tensors[f"{self.family.outside_layers[0]}.weight"].shape[0]

    def refuse_length(self, seqlen: int) -> None:
        """Raise UsageError for windows of more tokens than the model has positions."""
        self.shape  # noqa: B018  which refuses a limit that is none
        limit = self.config.get("max_position_embeddings")
        if limit is not None and seqlen > limit:
            raise UsageError(
                f"--seqlen {seqlen}: {self.name} has {limit} positions (max_position_embeddings): lower it"
            )

    def _refuse_layers(self, layers: int, tensors: int) -> None:
        """Raise FlapError for more layers than there are tensors, before anything is reserved for them."""
        if layers > max(tensors, FEW_LAYERS):
            raise FlapError(f"{self.name}: its configuration says {layers:,} layers, and it holds {tensors:,} tensors")

    def _refuse_quantised(self) -> None:
        """Raise FlapError where config.json says that weights are quantised, which every loader would act on."""
        if quantised := self.config.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise FlapError(
                f"{self.name} is quantised ({method}: config.json has a quantization_config), and flap prunes plain "
                "weights: give the model as it was before quantisation, or remove that key where they are plain"
            )

    def _refuse_odd_settings(self) -> None:
        """Raise FlapError for settings that loaders would choke on, or take for something else without a word."""
        self.generation  # noqa: B018  what can't be read is told before any work
        known = (None, "auto", *CODES, *(f"torch.{name}" for name in CODES))
        fine: dict[str, Callable[[Any], bool]] = {
            "dtype": lambda value: value in known,
            "torch_dtype": lambda value: value in known,
            "vocab_size": lambda value: value is None or (type(value) is int and 0 < value <= MAX_SIZE),
            "_attn_implementation": lambda value: value is None or isinstance(value, str | dict),
            "max_position_embeddings": lambda value: value is None or (type(value) is int and value > 0),
        }
        for key, is_fine in fine.items():
            if not is_fine(value := self.config.get(key)):
                raise FlapError(f"{self.name}: {key} in config.json is {value!r:.60}, which is none")

    def _refuse_untied(self) -> None:
        """Raise FlapError where head and embedding are stored both, and differ, though config.json ties them."""
        head, embedding = f"{self.family.head}.weight", f"{self.family.outside_layers[0]}.weight"
        if not self.tied or not {head, embedding} <= self.stored.keys():
            return
        one, other = self.read(head), self.read(embedding)
        if one.shape != other.shape or not bool((one == other).all()):
            raise FlapError(
                f"{self.name}: config.json says that head and embedding are one matrix (tie_word_embeddings), and "
                f"{head} and {embedding} differ: set tie_word_embeddings to false, or remove the one that is not meant"
            )

    def _stored_weights(self, num_layers: int) -> StoredWeights:
        """Bytes of all tensors that count, as apply writes them by default."""
        prefix = self.family.layer.split("{i}")[0]
        layers = [spec for name, spec in self.tensors.items() if name.startswith(prefix) and len(spec.shape) in (2, 3)]
        sizes = {ITEM_SIZE[spec.dtype] for spec in layers or self.tensors.values()}
        outputs = {
            m: [f"{self.family.output(i, m)}.bias" for i in range(num_layers)]
            for m in self.family.modules
            if m != "experts"
        }
        return StoredWeights(
            bytes=sum(spec.nbytes for spec in (*self.tensors.values(), *self.carried.values())),
            itemsize=(min(sizes), max(sizes)),
            output_biases={m: sum(name in self.tensors for name in names) for m, names in outputs.items()},
        )

    def _with_units(self, shape: ModelShape) -> ModelShape:
        """The shape with what its units are, and what goes with one."""
        groups = {layer.num_attention_heads / layer.num_key_value_heads for layer in shape.layers if layer[1]}
        single = groups != {1} and (len(groups) > 1 or all(layer.num_key_value_heads <= 1 for layer in shape.layers))
        wish = self.attention_unit or ("query_head" if single else "kv_group")
        unit = shape.with_attention_unit(wish).attention_unit
        entries = self._unit_entries(shape.model_copy(update={"attention_unit": "query_head"}), "attention")[1]
        shape = shape.model_copy(update={"attention_unit": unit})
        modules = self.family.modules
        found = {module: self._unit_entries(shape, module) for module in modules}
        rows, biases, weights = ({module: found[module][i] for module in modules} for i in range(3))
        usual = all(rows[module] == shape.producer_rows(module) for module in modules)
        shape = shape.model_copy(update={"unit_biases": biases, "unit_rows": None if usual else rows})
        if any(self.family.module(module).inputs for module in modules):
            shape = shape.model_copy(update={"unit_weights": weights})
        if not self.family.attention.unit_tensors or shape.query_heads_per_group == 1:
            return shape
        return shape.model_copy(update={"query_head_entries": entries})

    def _unit_entries(self, shape: ModelShape, module: Module) -> tuple[int, int, int]:
        """What goes with one unit: rows of all producing projections, entries of their biases and of unit tensors, and
        weights, its columns of the output projection included."""
        in_layers = [name for name in self.tensors if name.startswith(self.family.layer.split("{i}")[0])]
        rows, biases, weights = 0, 0, shape.channels_per_unit(module) * shape.hidden_size
        for name, row_map in self.rows(module).items():
            count = sum(row_map.per.get(size, 0) * number for size, number in shape.kept_of_one(module).items())
            if name not in self.family.module(module).producers:
                found = next((self.tensors[n] for n in in_layers if n.endswith(f".{name}")), None)
                biases += count * prod(found.shape[1:]) if found else 0
                continue
            rows += count
            weights += count * self._input_width(module, name)
            biases += count * any(n.endswith(f".{self.family.module(module).bias(name)}") for n in in_layers)
        return rows, biases, weights

    def _rows_of_one(self, module: Module, size: Size) -> int:
        """Rows of all producing projections for one of what `size` counts."""
        rows = self.rows(module)
        return sum(rows[name].per.get(size, 0) for name in self.family.module(module).producers)

    def _misfits(self, shape: ModelShape) -> Iterator[str]:
        """What is missing, unknown, or of a shape that the configuration does not say."""
        expected = self.expected_shapes(shape)
        yield from (f"tensor {name} is missing" for name in self._required(shape, expected) if name not in self.tensors)
        for name, want in (expected | self._vocabulary_shapes(shape)).items():
            spec = self.tensors.get(name)
            if spec is not None and spec.shape != want:
                yield f"tensor {name} has shape {list(spec.shape)}, expected {list(want)}"
        layers = [self.family.layer.format(i=i) for i in range(shape.num_layers)]
        whole = {f"{layer}.{part}" for layer in layers for part in self.family.untouched_in_layer}
        whole.update(self.family.outside_layers)
        beside = [part for module in self.family.modules for part in self.family.module(module).beside]
        expected |= {f"{layer}.{part}": () for layer in layers for part in beside}
        for name in self.tensors:
            if name not in expected and name.rpartition(".")[0] not in whole:
                yield f"tensor {name} is not known to family {self.family.name}"

    def _required(self, shape: ModelShape, expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
        """Tensors without which a loader would make up its own: all weights, and biases that config.json announces."""
        family = self.family
        yield from (f"{part}.weight" for part in family.outside_layers if not (self.tied and part == family.head))
        announced = {
            part
            for module in family.modules
            if self.setting(family.bias_options.get(module, "")) is True
            for part in (family.module(module).output, *family.module(module).producers)
        }
        there = {name.rpartition(".")[0] for name in self.tensors if not name.endswith(".bias")}
        announced |= set(self.flap.biases if self.flap and self.flap.modules else [])
        for i in range(shape.num_layers):
            prefix = family.layer.format(i=i)
            emptied = family.attention.output.rpartition(".")[0] if shape.units(i, "attention") == 0 else None
            yield from (
                f"{prefix}.{part}.weight"
                for part in family.untouched_in_layer
                if part.rpartition(".")[0] != emptied and f"{prefix}.{part}" not in there
            )
            yield from (name for part in announced if (name := f"{prefix}.{part}.bias") in expected)
        yield from self._weights_of_modules(shape)

    def _weights_of_modules(self, shape: ModelShape) -> Iterator[str]:
        """Weights of the projections of all modules that have units, and what goes beside them."""
        for module in self.family.modules:
            description = self.family.module(module)
            parts = [description.weight(name) for name in (description.output, *description.producers)]
            for i in range(shape.num_layers):
                if shape.units(i, module):
                    prefix = self.family.layer.format(i=i)
                    yield from (f"{prefix}.{part}" for part in (*parts, *description.beside))

    def _vocabulary_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Shapes of embedding and head where config.json says them: loaders reserve what it says."""
        rows: Any = self.config.get("vocab_size")  # config.json's own: what it leaves out, the tensors say
        parts = (self.family.outside_layers[0], self.family.head) if rows is not None else ()
        key = self.family.sizes.get("embedding_size")
        width = self.setting(key) if isinstance(key, str) else shape.hidden_size
        return {f"{part}.weight": (rows, width) for part in parts}

    def expected_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights and possible biases of the projections that pruning touches."""
        expected: dict[str, tuple[int, ...]] = {}
        order = -1 if self.family.transposed else 1
        for module in self.family.modules:
            description, rows = self.family.module(module), self.rows(module)
            for i, layer in enumerate(shape.layers):
                prefix, channels = f"{self.family.layer.format(i=i)}.", shape.channels(i, module)
                every = (layer.num_experts,) * description.of_experts
                turn = -1 if description.transposed else order
                if self.lacks(i, module):
                    continue
                expected[prefix + description.bias(description.output)] = (*every, shape.hidden_size)
                for name in description.unit_tensors:
                    if found := self.tensors.get(prefix + name):
                        expected[found.name] = (rows[name].count(layer), *found.shape[1:]) if channels else found.shape
                if channels == 0:  # pruned away whole: at most the bias is there
                    continue
                columns = layer.expert_size if description.of_experts else channels
                weight = prefix + description.weight(description.output)
                expected[weight] = (*every, *(shape.hidden_size, columns)[::turn])
                for name in description.producers:
                    count, width = rows[name].count(layer), self._input_width(module, name)
                    expected[prefix + description.weight(name)] = (*every, *(count, width)[::turn])
                    expected[prefix + description.bias(name)] = (*every, count)
        return expected
