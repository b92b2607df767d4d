"""A GGUF file of llama.cpp as a checkpoint: tensors under transformers' names, dequantised one by one."""

import hashlib
from copy import deepcopy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.family import Family, family_of_gguf
from flapcli.architecture.gguf_form import SIZES, GgufForm
from flapcli.architecture.rope import llama3_parameters, rope_of
from flapcli.architecture.shape import Module
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.checkpoints.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from flapcli.checkpoints.gguf_layout import GgufLayout
from flapcli.errors import FlapError, first_line
from flapcli.storage.safetensors_file import TensorSpec

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING = "token_embd.weight"
TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}


class GgufCheckpoint(Checkpoint):
    @cached_property
    def header(self) -> GgufHeader:
        header = read_gguf_header(self.path)
        if (parts := header.metadata.get("split.count")) not in (None, 0, 1):
            raise FlapError(f"{self.path} is one of {parts} parts: join them by `llama-gguf-split --merge`")
        if header.metadata.get("general.type", "model") != "model":
            raise FlapError(
                f"{self.path} holds no model but a {header.metadata['general.type']!r:.60}: merge a LoRA adapter into "
                "its model (llama-export-lora) and give that"
            )
        return header

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.path.name} {self.path.stat().st_size}".encode())
        digest.update(self.header.raw)
        return digest.hexdigest()

    @cached_property
    def family(self) -> Family:
        return family_of_gguf(str(self.header.metadata.get("general.architecture")), self.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        config = self._config.to_dict()
        config.pop("_name_or_path", None)
        return config

    @cached_property
    def _config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        metadata, form = self.header.metadata, self._form
        keys = {SIZES[size]: key for size, key in self.family.sizes.items() if isinstance(key, str)} | form.settings
        named = [(f"{form.architecture}.{name}", key) for name, key in keys.items()]
        named += [(f"tokenizer.ggml.{name}_token_id", key) for key, name in TOKENS.items()]
        # A zero that is no token's id says that there is none, such as a sliding window of no tokens.
        given = {k: v for n, k in named if (v := metadata.get(n)) is not None and (v is False or v != 0 or k in TOKENS)}
        scaling = metadata.get(f"{form.architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise FlapError(f"{self.path}: rope scaling of type {scaling} is not read from GGUF; give the folder")
        sizes = self.family.read_sizes(given.get, self._width)
        self.refuse_layers(sizes["num_layers"], len(self.header.tensors))
        given |= {key: self._has_biases(module) for module, key in self.family.bias_options.items()}
        if form.rotary and (channels := metadata.get(f"{form.architecture}.rope.dimension_count")):
            given[form.rotary] = channels / sizes["head_dim"]
        try:
            config = AutoConfig.for_model(
                self.family.name,
                vocab_size=next(tensor.shape[0] for tensor in self.header.tensors if tensor.name == EMBEDDING),
                tie_word_embeddings=all(tensor.name != "output.weight" for tensor in self.header.tensors),
                **given,
            )
        except Exception as error:  # each value has a check of its own
            raise FlapError(f"{self.path}: its metadata make no {self.family.name}: {first_line(error)}") from error
        factors = next((tensor for tensor in self.header.tensors if tensor.name == ROPE_FACTORS), None)
        if factors is not None:
            theta = rope_of(config.to_dict())["rope_theta"]
            parameters = llama3_parameters(self._dequantised(factors).ravel(), theta)
            if parameters is None:
                raise FlapError(
                    f"{self.path}: its {ROPE_FACTORS} is not Llama-3's scaling with Meta's parameters, the only one "
                    "that flap can tell from the factors: use the model's folder"
                )
            config.rope_parameters = parameters  # transformers computes the factors from these, and reads none
        if unmet := form.unmet(lambda key: getattr(config, key, None)):
            raise FlapError(f"{self.path}: {unmet}: give the model's folder")
        return config

    def _has_biases(self, module: Module) -> bool:
        """Whether projections of a module have biases, which a configuration says and metadata does not."""
        begin = f"blk.0.{'attn' if module == 'attention' else 'ffn'}_"
        names = [tensor.name for tensor in self.header.tensors]
        return any(n.startswith(begin) and n.endswith(".bias") and "norm" not in n for n in names)

    def load_config(self) -> "PreTrainedConfig":
        return self._config

    @cached_property
    def reader(self) -> "GGUFReader":
        """gguf's own reader, for what the header alone does not hold: every token of the vocabulary."""
        from gguf import GGUFReader

        return GGUFReader(self.path)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return self.family.read_sizes(self.setting, self._width)

    @property
    def _width(self) -> int | None:
        """The MLP's, for families whose configuration need not say it."""
        found = self.header.metadata.get(f"{self._form.architecture}.feed_forward_length")
        return found if isinstance(found, int) else None

    @property
    def _form(self) -> GgufForm:
        form = self.family.gguf.own
        assert form, "a family is found by its form"
        return form

    @cached_property
    def _layout(self) -> GgufLayout:
        return GgufLayout(self, self._form)

    @cached_property
    def _by_name(self) -> dict[str, GgufTensor]:
        names = {theirs: ours for ours, theirs in self._layout.names.items()}
        names = {theirs + suffix: ours + suffix for theirs, ours in names.items() for suffix in (".weight", ".bias")}
        tensors = [tensor for tensor in self.header.tensors if tensor.name != ROPE_FACTORS]
        unknown = [tensor.name for tensor in tensors if tensor.name not in names]
        if unknown:
            raise FlapError(f"{self.path}: tensor {unknown[0]} has no place in family {self.family.name}")
        return {names[tensor.name]: tensor for tensor in tensors}

    @cached_property
    def stored(self) -> dict[str, TensorSpec]:
        shapes = {
            name: t.shape[::-1] if self._layout.is_transposed(name) else t.shape for name, t in self._by_name.items()
        }
        return {name: TensorSpec(name, shape, "F32") for name, shape in shapes.items()}

    @property
    def _stored_sizes(self) -> list[tuple[str, int]]:
        from gguf import GGMLQuantizationType

        return [(GGMLQuantizationType(tensor.type).name, tensor.nbytes) for tensor in self.header.tensors]

    @property
    def license(self) -> str | None:
        return self.header.metadata.get("general.license")

    def _dequantised(self, tensor: GgufTensor) -> NDArray[np.float32]:
        from gguf import GGMLQuantizationType, dequantize

        with self.path.open("rb") as file:
            file.seek(tensor.start)
            stored = np.fromfile(file, dtype=np.uint8, count=tensor.nbytes)
        rows = stored.reshape(*tensor.shape[:-1], -1)
        values = dequantize(rows, GGMLQuantizationType(tensor.type)).astype(np.float32, copy=False)
        return values.reshape(tensor.shape)

    def read(self, name: str) -> "torch.Tensor":
        import torch

        values, prefix = torch.from_numpy(self._dequantised(self._by_name[name])), name.rpartition(".")[0]
        for _, _, pieces in self._layout.targets.get(prefix, []):
            if pieces[0].rows is not None:
                rows = np.concatenate([piece.rows for piece in pieces if piece.rows is not None])
                values = values[torch.from_numpy(np.argsort(rows))]
        if self._layout.is_transposed(name):
            values = values.T.contiguous()
        return values - 1 if self._layout.is_plus_one(name) else values

    @property
    def generation(self) -> dict[str, Any]:
        return {}

    @property
    def may_open_texts(self) -> bool:
        return self.header.metadata.get("tokenizer.ggml.add_bos_token") is not False

    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        if "tokenizer.ggml.model" not in self.header.metadata:
            raise FlapError("the file holds none: give one that was converted with its vocabulary")
        return deepcopy(_tokenizer(self.path, self.path.stat().st_mtime_ns, self.fingerprint))


@lru_cache(1)
def _tokenizer(path: Path, _written: int, _fingerprint: str) -> "PreTrainedTokenizerBase":
    """Made of the file's metadata, which takes seconds: once for all stages of a run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def metadata_string(path: Path, key: str) -> str | None:
    """One text of a GGUF's metadata, None where it has no such text. Raises FlapError for what is no GGUF."""
    value = read_gguf_header(path).metadata.get(key)
    return value if isinstance(value, str) else None
