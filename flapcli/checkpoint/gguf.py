"""A GGUF file of llama.cpp as a checkpoint: tensors under transformers' names, dequantised one by one."""

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from flapcli.checkpoint.base import Checkpoint
from flapcli.checkpoint.folder import first_line
from flapcli.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from flapcli.errors import FlapError
from flapcli.families import Family, family_of_gguf
from flapcli.safetensors_io import TensorSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}


class GgufCheckpoint(Checkpoint):
    @cached_property
    def header(self) -> GgufHeader:
        return read_gguf_header(self.path)

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
        config = self.load_config().to_dict()
        config.pop("_name_or_path", None)
        return config

    @cached_property
    def _config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        metadata, gguf = self.header.metadata, self.family.gguf
        found = {key: metadata.get(f"{gguf.architecture}.{name}") for name, key in gguf.config.items()}
        found |= {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in TOKENS.items()}
        scaling = metadata.get(f"{gguf.architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise FlapError(f"{self.path}: rope scaling of type {scaling} is not read from GGUF; give the folder")
        sizes = {key: value for key, value in found.items() if value is not None}
        try:
            return AutoConfig.for_model(
                self.family.model_type,
                vocab_size=metadata["tokenizer.ggml.tokens"].items,
                tie_word_embeddings=all(tensor.name != "output.weight" for tensor in self.header.tensors),
                **sizes,
            )
        except (KeyError, AttributeError, ValueError, TypeError) as error:
            raise FlapError(f"{self.path}: its metadata make no {self.family.name}: {first_line(error)}") from error

    def load_config(self) -> "PreTrainedConfig":
        return self._config

    @cached_property
    def _by_name(self) -> dict[str, GgufTensor]:
        names = _transformers_names(self.family, self.family.read_sizes(self.config)["num_layers"])
        unknown = [t.name for t in self.header.tensors if t.name not in names]
        if unknown:
            raise FlapError(f"{self.path}: tensor {unknown[0]} has no place in family {self.family.name}")
        return {names[t.name]: t for t in self.header.tensors}

    @cached_property
    def stored(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(name, tensor.shape, "F32") for name, tensor in self._by_name.items()}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.header.tensors)

    @property
    def stored_as(self) -> str:
        from gguf import GGMLQuantizationType

        sizes: dict[int, int] = {}
        for tensor in self.header.tensors:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
        return GGMLQuantizationType(max(sizes, key=lambda kind: sizes[kind])).name

    @property
    def license(self) -> str | None:
        return self.header.metadata.get("general.license")

    def read(self, name: str) -> "torch.Tensor":
        import torch
        from gguf import GGMLQuantizationType, dequantize

        tensor = self._by_name[name]
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            stored = np.fromfile(file, dtype=np.uint8, count=tensor.nbytes)
        rows = stored.reshape(*tensor.shape[:-1], -1)
        values = torch.from_numpy(dequantize(rows, GGMLQuantizationType(tensor.type))).float()
        values = values.reshape(tensor.shape)
        for producer in self.family.gguf.permuted:
            if f".{producer}." in name:
                key = self.family.sizes[self.family.attention.producers[producer]]
                return _unpermute(values, self.config[key])
        return values

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)


def _unpermute(rows: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Undo llama.cpp's interleaving of the two rotary halves of each head's rows."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _transformers_names(family: Family, num_layers: int) -> dict[str, str]:
    """llama.cpp's tensor names to transformers', for all that the family's description names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.gguf.architecture)
    table = get_tensor_name_map(arch, num_layers)
    parts = [*family.uncut]
    for module in (family.attention, family.mlp):
        parts += [module.output, *module.producers]
    prefixes = [f"{family.layer.format(i=i)}.{part}" for i in range(num_layers) for part in parts]
    names = {}
    for prefix in prefixes + family.outside:
        for suffix in (".weight", ".bias"):
            if (found := table.get_name(prefix)) is not None:
                names[found + suffix] = prefix + suffix
    return names
