"""A Hugging Face folder with safetensors weights, in one file or in shards."""

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flapcli.checkpoint.base import Checkpoint, architecture_digest
from flapcli.errors import FlapError
from flapcli.safetensors_io import Header, TensorSpec, read_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class SafetensorsCheckpoint(Checkpoint):
    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json", f"{self.name} is no checkpoint folder")

    @cached_property
    def headers(self) -> dict[Path, Header]:
        return {path: read_header(path) for path in self._weight_files()}

    def _weight_files(self) -> list[Path]:
        single = self.path / "model.safetensors"
        if single.exists():
            return [single]
        index = read_json(self.path / "model.safetensors.index.json", f"{self.name} has no safetensors weights")
        return [self.path / file for file in sorted(set(index.get("weight_map", {}).values()))]

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: path for path, header in self.headers.items() for name in header.tensors}

    @cached_property
    def stored(self) -> dict[str, TensorSpec]:
        return {name: spec for header in self.headers.values() for name, spec in header.tensors.items()}

    @cached_property
    def fingerprint(self) -> str:
        digest = architecture_digest(self.config)
        for path, header in self.headers.items():
            digest.update(f"{path.name} {path.stat().st_size}".encode() + header.raw)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.stored.values())

    @property
    def stored_as(self) -> str:
        sizes: dict[str, int] = {}
        for spec in self.stored.values():
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def license(self) -> str | None:
        card = self.path / "README.md"
        try:
            metadata = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
            return str(metadata["license"])
        except (OSError, UnicodeDecodeError, IndexError, KeyError, TypeError, yaml.YAMLError):
            return None  # no card, or one without metadata

    def read(self, name: str) -> "torch.Tensor":
        from safetensors import safe_open

        # Opened for each tensor: a mapping that is kept would count every page read as ours.
        with safe_open(self._places[name], framework="pt") as file:
            return file.get_tensor(name)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.hub.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise FlapError(f"{self.name}: its tokenizer can't be loaded: {first_line(error)}") from error

    def load_config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path)


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """A JSON object from a file. Raises FlapError, begun with `otherwise` where the file is missing."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FlapError(f"{otherwise}: {path} is missing") from error
    except (OSError, ValueError) as error:
        raise FlapError(f"{path} can't be read as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise FlapError(f"{path} is not a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
