"""What every kind of checkpoint offers: sizes and fingerprint from headers, tensors one by one."""

import json
from abc import abstractmethod
from collections import Counter
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.architecture.family import SIZES, renamed
from flapcli.architecture.flap_section import MadeBy
from flapcli.architecture.shape import ModelShape, Module
from flapcli.architecture.wrapper import Wrapper
from flapcli.checkpoints.companion_files import decides_tokens
from flapcli.checkpoints.described import Described
from flapcli.checkpoints.unit_counts import rows_of_one, stored_weights, with_units
from flapcli.checkpoints.verification import refuse_misfits, refuse_odd_settings, refuse_quantised, refuse_untied
from flapcli.errors import FlapError, UsageError, first_line
from flapcli.storage.hashing import files_sha256
from flapcli.storage.json_file import lfs_hint

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


TOKEN_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # which are no tokenizer


class Checkpoint(Described):
    """A checkpoint that the stages work on."""

    @property
    def config_in_files(self) -> dict[str, Any]:
        """config.json as it is, where the model is made of files that are of another kind."""
        return self.config

    @property
    def wrapper(self) -> Wrapper | None:
        """What the model is a part of in the files, if of anything."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what identifies the model without reading weights."""

    @property
    @abstractmethod
    def _stored_sizes(self) -> list[tuple[str, int]]:
        """Type (such as BF16 or Q4_1) and bytes of every tensor as stored."""

    @property
    @abstractmethod
    def license(self) -> str | None:
        """The licence's id as its publisher states it, where one is stated."""

    @property
    def is_converted(self) -> bool:
        """Whether transformers can't take the files as they are, but the tensors that are made of them."""
        return self.path.is_file()

    @cached_property
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
            raise FlapError(f"{self.name}: its tokenizer can't be loaded: {self._why_no_tokenizer(error)}") from error

    def _why_no_tokenizer(self, error: Exception) -> str:
        """Which file is missing or broken, as far as flap can tell; else what the library said."""
        if not self.path.is_dir() or isinstance(error, FlapError):
            return first_line(error)
        files = [path for path in sorted(self.path.iterdir()) if decides_tokens(path.name, False)]
        for path in files:
            if path.suffix == ".json":
                try:
                    json.loads(path.read_bytes())
                except (OSError, ValueError, RecursionError) as broken:
                    return f"{path.name} can't be read ({first_line(broken)}): fetch it anew{lfs_hint(path)}"
        if all(path.name in TOKEN_SETTINGS for path in files):
            return "there is none: put the model's tokenizer.json and tokenizer_config.json beside its config.json"
        return f"{first_line(error)} (read from {', '.join(path.name for path in files)}){lfs_hint(*files)}"

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

    @property
    def made_by(self) -> MadeBy | None:
        """What this checkpoint was pruned from and how; None of one that was not."""
        return self.flap.made_by if self.flap else None

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes for planning, checked against the tensors. Raises FlapError naming all that do not fit."""
        refuse_quantised(self)
        refuse_odd_settings(self)
        sizes = self.sizes
        self.refuse_layers(sizes["num_layers"], len(self.stored))
        layers = self.layer_shapes()
        shape = ModelShape(
            name=self.name,
            revision=self.hub.revision,
            fingerprint=self.fingerprint,
            family=self.family.name,
            parameters=sum(prod(spec.shape) for spec in (*self.tensors.values(), *self.carried.values())),
            mlp_projections=rows_of_one(self, "mlp", "intermediate_size") + 1,
            unit_biases=dict.fromkeys(self.family.modules, 0),
            layers=layers,
            weights=stored_weights(self, sizes["num_layers"]),
            attention_unit=None,
            unit_rows=None,
            unit_weights=None,
            whole={m: why for m in self.family.modules if (why := self.family.module(m).stays_whole)} or None,
            every_expert=self.family.experts.every_expert if self.family.experts else None,
            **{name: sizes[name] for name in SIZES},
        )
        shape = with_units(self, shape)
        refuse_untied(self)
        refuse_misfits(self, shape)
        return shape

    def refuse_ids(self, ids: "NDArray[np.int64]") -> None:
        """Raise FlapError for tokens that the embedding has no row for."""
        if ids.size and (largest := int(ids.max())) >= self.vocabulary:
            raise FlapError(
                f"{self.name}: its tokenizer gives the id {largest}, and its embedding has only {self.vocabulary} "
                "rows: put the tokenizer.json that belongs to the model in place of this one, or resize the embedding "
                "(resize_token_embeddings)"
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
