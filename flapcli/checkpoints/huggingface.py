"""A Hugging Face folder as a checkpoint: what all share, and those with safetensors weights, whole or in shards."""

import hashlib
import json
import re
from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.checkpoints.shards import raw_bytes
from flapcli.checkpoints.weight_index import index_of, weight_map
from flapcli.errors import FlapError, first_line
from flapcli.storage.dtypes import torch_dtype
from flapcli.storage.json_file import read_json
from flapcli.storage.safetensors_file import Header, TensorSpec, read_header, read_into

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CARD_START = 1 << 20  # characters of a README.md in which its licence is looked for
# What of config.json decides the function that the weights compute.
ARCHITECTURE_KEYS = [
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
]  # fmt: skip


class FolderCheckpoint(Checkpoint):
    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json", f"{self.name} is no checkpoint folder")

    def _weight_files(self, single: str, kind: str) -> list[Path]:
        """The one weight file of that name, or all that its index names."""
        path = self.path / single
        if path.exists():
            return [path]
        named = sorted(set(weight_map(self.path, single, f"{self.name} has no {kind} weights").values()))
        if missing := [file for file in named if not (self.path / file).exists()]:
            more = f" and {len(missing) - 3} more" if missing[3:] else ""
            raise FlapError(
                f"{self.path} lacks {', '.join(missing[:3])}{more}, which its {index_of(single)} names: copy or "
                "download the checkpoint anew"
            )
        return [self.path / file for file in named]

    def _architecture_digest(self) -> "hashlib._Hash":
        """A SHA-256 fed with the architecture's fields of config.json; what tells the weights is to be added."""
        fields = {key: self.config[key] for key in ARCHITECTURE_KEYS if key in self.config}
        # Pruned folders of equal sizes differ by the plan that they were made by, which stands under `flap`.
        fields["flap"] = self.config.get("flap")
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode())

    @property
    @abstractmethod
    def in_files(self) -> dict[str, TensorSpec]:
        """Every tensor by its name in the files."""

    @abstractmethod
    def read_from_file(self, name: str) -> "torch.Tensor":
        """One tensor by its name in the files."""

    @cached_property
    def stored(self) -> dict[str, TensorSpec]:
        found: dict[str, TensorSpec] = {}
        for theirs, spec in self.in_files.items():
            name = self.family.own_name(theirs)
            if name in found:
                raise FlapError(f"{self.name} holds {name} twice, once as {theirs}: remove the one that is not meant")
            found[name] = replace(spec, name=name)
        return found

    @cached_property
    def name_in_files(self) -> dict[str, str]:
        return {self.family.own_name(theirs): theirs for theirs in self.in_files}

    def read(self, name: str) -> "torch.Tensor":
        return self.read_from_file(self.name_in_files[name])

    @property
    def _stored_sizes(self) -> list[tuple[str, int]]:
        return [(spec.dtype, spec.nbytes) for spec in self.stored.values()]

    @property
    def license(self) -> str | None:
        try:
            with (self.path / "README.md").open(encoding="utf-8", errors="replace") as card:
                text = card.read(CARD_START)
        except OSError:
            return None
        # By this line alone: YAML of a stranger's can grow without bound.
        found = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", text.split("---")[1], re.M) if text[:3] == "---" else None
        return found[1] if found else None

    @cached_property
    def generation(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        found = read_json(path) if path.exists() else {}
        stops = found.get("eos_token_id")
        if not all(stop is None or type(stop) is int for stop in (stops if isinstance(stops, list) else [stops])):
            raise FlapError(f"{path}: eos_token_id is {stops!r:.60}, where a token's id or a list of them is wanted")
        return found

    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.hub.trust_remote_code)

    def load_config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path)
        except Exception as error:  # each field has a check of its own
            raise FlapError(f"{self.name}: transformers can't read its config.json: {first_line(error)}") from error


class SafetensorsCheckpoint(FolderCheckpoint):
    @cached_property
    def _headers(self) -> dict[Path, Header]:
        return {path: read_header(path) for path in self._weight_files("model.safetensors", "safetensors")}

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: path for path, header in self._headers.items() for name in header.tensors}

    @property
    def in_files(self) -> dict[str, TensorSpec]:
        return {name: spec for header in self._headers.values() for name, spec in header.tensors.items()}

    @cached_property
    def fingerprint(self) -> str:
        digest = self._architecture_digest()
        for path, header in self._headers.items():
            digest.update(f"{path.name} {path.stat().st_size}".encode() + header.raw)
        return digest.hexdigest()

    def read_from_file(self, name: str) -> "torch.Tensor":
        import torch

        path = self._places[name]
        spec = self._headers[path].tensors[name]
        tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        if spec.nbytes:
            read_into(path, self._headers[path].offsets[name], raw_bytes(tensor))
        return tensor
