"""A GGUF file of llama.cpp as a checkpoint: tensors under transformers' names, dequantised one by one."""

import hashlib
import io
import struct
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.checkpoint.safetensors import first_line
from flapcli.errors import FlapError
from flapcli.families import Family
from flapcli.rope import llama3_parameters, rope_of
from flapcli.safetensors_io import TensorSpec

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SCALAR_SIZE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint(Checkpoint):
    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.path.name} {self.path.stat().st_size}".encode())
        digest.update(_header(self.path))
        return digest.hexdigest()

    @cached_property
    def config(self) -> dict[str, Any]:
        config = self.load_config().to_dict()
        config.pop("_name_or_path", None)
        return config

    @cached_property
    def _config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        _header(self.path)  # says what is wrong with a broken file before others stumble over it
        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise FlapError(f"{self.path}: transformers can't read this GGUF file: {first_line(error)}") from error
        if self._rope_factors is not None:
            config.rope_parameters = self._rope_parameters(rope_of(config.to_dict()), self._rope_factors)
        return config

    @cached_property
    def _rope_factors(self) -> NDArray[np.float32] | None:
        """Divisors of the rotary frequencies, (head_dim / 2,), where the file has them."""
        found = [t for t in self.reader.tensors if t.name == ROPE_FACTORS]
        return np.asarray(found[0].data, dtype=np.float32).ravel() if found else None

    def _rope_parameters(self, rope: dict[str, Any], factors: NDArray[np.float32]) -> dict[str, Any]:
        """What transformers needs to compute the file's factors, which it does not read itself."""
        parameters = llama3_parameters(factors, rope["rope_theta"])
        if parameters is None:
            raise FlapError(f"{self.path}: its {ROPE_FACTORS} is not Llama-3's scaling with Meta's parameters, the "
                            "only one that flap can tell from the factors: use the model's folder")  # fmt: skip
        return parameters

    def load_config(self) -> "PreTrainedConfig":
        return self._config

    @cached_property
    def reader(self) -> "GGUFReader":
        from gguf import GGUFReader

        try:
            return GGUFReader(self.path)
        except (OSError, ValueError, IndexError) as error:
            raise FlapError(f"{self.path} is truncated or corrupt: {first_line(error)}") from error

    @cached_property
    def _by_name(self) -> dict[str, "ReaderTensor"]:
        layers = self.family.read_sizes(self.config)["num_layers"]
        names = transformers_names(self.family, layers, self.family.gguf.architecture)
        tensors = [t for t in self.reader.tensors if t.name != ROPE_FACTORS]
        unknown = [t.name for t in tensors if t.name not in names]
        if unknown:
            raise FlapError(f"{self.path}: tensor {unknown[0]} has no place in family {self.family.name}")
        return {names[t.name]: t for t in tensors}

    @cached_property
    def stored(self) -> dict[str, TensorSpec]:
        return {
            name: TensorSpec(name, tuple(int(n) for n in reversed(tensor.shape)), "F32")
            for name, tensor in self._by_name.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(int(tensor.n_bytes) for tensor in self.reader.tensors)

    @property
    def stored_as(self) -> str:
        """The type that most of the weights are stored in, such as Q4_1."""
        sizes: dict[str, int] = {}
        for tensor in self.reader.tensors:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
        return max(sizes, key=lambda kind: sizes[kind])

    def read(self, name: str) -> "torch.Tensor":
        import torch
        from gguf import dequantize

        tensor = self._by_name[name]
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        values = values.float().reshape(self.stored[name].shape)
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


def transformers_names(family: Family, num_layers: int, architecture: str) -> dict[str, str]:
    """llama.cpp's tensor names in `architecture` to transformers', for all that the family's description names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
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


def _header(path: Path) -> bytes:
    """The file up to its tensor data. Raises FlapError where it is no GGUF, corrupt or truncated.

    gguf's reader builds an object for every token, seconds for what a fingerprint needs; this skips.
    """
    try:
        with path.open("rb") as file:
            magic, _version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF":
                raise FlapError(f"{path} is not a GGUF file")
            for _ in range(pairs):
                _skip_string(file)
                _skip_value(file, *struct.unpack("<I", file.read(4)))
            for _ in range(tensors):
                _skip_string(file)
                (dims,) = struct.unpack("<I", file.read(4))
                file.seek(8 * dims + 4 + 8, 1)
            end = file.tell()
            file.seek(0)
            header = file.read(end)
    except (struct.error, KeyError, OverflowError) as error:
        raise FlapError(f"{path} is truncated or corrupt: its GGUF header can't be read") from error
    except OSError as error:
        raise FlapError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < end:
        raise FlapError(f"{path} is truncated: it ends inside its GGUF header")
    return header


def metadata_string(path: Path, key: str) -> str | None:
    """One text of a GGUF's metadata, None where it has no such text. Raises FlapError as `_header` does."""
    header = io.BytesIO(_header(path))
    _, _, _, pairs = struct.unpack("<4sIQQ", header.read(24))
    for _ in range(pairs):
        name, kind = _read_string(header), struct.unpack("<I", header.read(4))[0]
        if name == key:
            return _read_string(header) if kind == STRING else None
        _skip_value(header, kind)
    return None


def _read_string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8", errors="replace")


def _skip_string(file: BinaryIO) -> None:
    (length,) = struct.unpack("<Q", file.read(8))
    file.seek(length, 1)


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == STRING:
        _skip_string(file)
    elif kind == ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in SCALAR_SIZE:
            file.seek(SCALAR_SIZE[inner] * count, 1)
        else:
            for _ in range(count):
                _skip_value(file, inner)
    else:
        file.seek(SCALAR_SIZE[kind], 1)
