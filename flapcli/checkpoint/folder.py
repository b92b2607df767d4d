"""What checkpoints in a Hugging Face folder share, whatever their weight files are."""

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flapcli.checkpoint.base import Checkpoint
from flapcli.errors import FlapError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# safetensors' dtype codes to torch's names.
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class FolderCheckpoint(Checkpoint):
    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json", f"{self.name} is no checkpoint folder")

    def _weight_files(self, single: str, kind: str) -> list[Path]:
        """The one weight file of that name, or all that its index names."""
        path = self.path / single
        if path.exists():
            return [path]
        index = read_json(self.path / f"{single}.index.json", f"{self.name} has no {kind} weights")
        return [self.path / file for file in sorted(set(index.get("weight_map", {}).values()))]

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
