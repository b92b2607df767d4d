"""A Hugging Face folder as a checkpoint, whatever its weights are stored in."""

import hashlib
import json
import re
from abc import abstractmethod
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.architecture.family import PER_LAYER, Family, family_of
from flapcli.architecture.source import Place, Source, source_of
from flapcli.architecture.wrapper import Wrapper, wrappers
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.checkpoints.companion_files import companion_files
from flapcli.checkpoints.expert_files import Parts, experts_in_files, spec_of
from flapcli.checkpoints.weight_index import index_of, weight_map
from flapcli.errors import FlapError, first_line
from flapcli.storage.dtypes import torch_dtype
from flapcli.storage.json_file import read_json
from flapcli.storage.safetensors_file import TensorSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CARD_START = 1 << 20  # characters of a README.md in which its licence is looked for
# Keys of config.json that change nothing of what the weights compute: who wrote and loads it, training, which tokens
# mean what, what is given back, and settings of generation that old files hold. All others may, known or not.
WITHOUT_EFFECT = {
    "_attn_implementation", "_attn_implementation_autoset", "_model_name_or_path", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "dtype", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    "aux_loss_alpha", "gradient_checkpointing", "init_std", "initializer_range", "initializer_std",
    "input_jitter_noise", "output_router_logits", "pretraining_tp", "router_aux_loss_coef", "router_jitter_noise",
    "router_z_loss_coef", "attn_pdrop", "embd_pdrop", "layerdrop", "resid_pdrop",
    "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "chunk_size_feed_forward", "finetuning_task", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "num_labels", "output_attentions", "output_hidden_states", "prefix", "problem_type", "return_dict",
    "task_specific_params",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
# Tokenizers by a tokenizer.json alone, to which their code adds no token.
PLAIN_TOKENIZERS = (
    "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
)  # fmt: skip
SCALED_ROTATION = re.compile(r'"(rope_)?type": "(?!default")')


class FolderCheckpoint(Checkpoint):
    @cached_property
    def config_in_files(self) -> dict[str, Any]:
        return read_json(self.path / "config.json", f"{self.name} is no checkpoint folder")

    @cached_property
    def source(self) -> Source | None:
        return source_of(self.config_in_files.get("model_type"), self.config_in_files.get)

    @cached_property
    def wrapper(self) -> Wrapper | None:
        return wrappers().get(str(self.config_in_files.get("model_type")))

    @cached_property
    def config(self) -> dict[str, Any]:
        found = self.config_in_files
        if self.source:
            return self.source.native_config(found, self.name)
        return self._text_config(self.wrapper) if self.wrapper else found

    def _text_config(self, wrapper: Wrapper) -> dict[str, Any]:
        """The text model's configuration, as its own class has it, where it is a part of what lies in the folder."""
        found, whole = self.config_in_files, self._transformers_config()
        text = whole.get_text_config().to_dict()
        kind = str(text["model_type"])
        own = {"model_type": wrapper.families.get(kind, kind), "tie_word_embeddings": whole.tie_word_embeddings}
        own |= {key: found[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in found}
        if isinstance(flap := found.get("flap"), dict):
            own["flap"] = {key: value for key, value in flap.items() if key != "decoder_layers"}
        return text | own

    @property
    def is_converted(self) -> bool:
        return bool(self.source or self.wrapper)

    @cached_property
    def family(self) -> Family:
        overrides = self.wrapper.overrides if self.wrapper else None
        return family_of(self.config.get("model_type"), self.setting, self.name, overrides)

    @cached_property
    def companions(self) -> dict[str, Path]:
        code = self.config_in_files.get("auto_map") if self.source else None
        named = code.items() if isinstance(code, dict) else ()
        # What reads the publisher's form of the model, which is not what is written.
        left = {f"{str(place).partition('.')[0]}.py" for kind, place in named if kind != "AutoTokenizer"}
        return {name: path for name, path in companion_files(self.path).items() if name not in left}

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
        """A SHA-256 fed with what of config.json may matter; what tells the weights is to be added."""
        # Pruned folders of equal sizes differ by the plan that they were made by, which stands under `flap`.
        flap = {"flap": self.config_in_files.get("flap")}
        try:
            return hashlib.sha256(json.dumps(_with_effect(self.config_in_files) | flap, sort_keys=True).encode())
        except RecursionError as error:
            raise FlapError(f"{self.name}: its config.json is nested too deeply") from error

    @property
    @abstractmethod
    def in_files(self) -> dict[str, TensorSpec]:
        """Every tensor by its name in the files."""

    @abstractmethod
    def read_from_file(self, name: str, rows: slice = slice(None)) -> "torch.Tensor":
        """One tensor by its name in the files, or some of its rows, which are all that is read."""

    @cached_property
    def _found(self) -> dict[str, Place]:
        """Where the files hold each of the model's tensors."""
        found: dict[str, Place] = {}
        for theirs, spec in self.in_files.items():
            if theirs in self.carried:
                continue
            for name, place in self._made_of(spec):
                if name in found:
                    raise FlapError(
                        f"{self.name} holds {name} twice, once as {theirs}: remove the one that is not meant"
                    )
                found[name] = place
        return found

    @cached_property
    def _sizes_told(self) -> dict[str, int]:
        """Sizes by the configuration alone."""
        return self.family.read_sizes(self.setting)

    def _made_of(self, spec: TensorSpec) -> list[tuple[str, Place]]:
        """The model's tensors that are made of one in the files."""
        if not self.source:
            return [(self.own_name(spec.name), Place(spec.name))]
        try:
            return list(self.source.places(spec.name, spec.shape[0] if spec.shape else 1, self._sizes_told))
        except FlapError as error:
            raise FlapError(f"{self.name}: {error}") from error

    @cached_property
    def carried(self) -> dict[str, TensorSpec]:
        if not (wrapper := self.wrapper):
            return {}
        return {name: spec for name, spec in self.in_files.items() if wrapper.carries(name)}

    @cached_property
    def _one_by_one(self) -> dict[str, TensorSpec]:
        in_files = self.in_files
        found = {}
        for name, (theirs, rows, _) in self._found.items():
            spec = in_files[theirs]
            shape = spec.shape if rows is None else (len(rows), *spec.shape[1:])
            found[name] = TensorSpec(name, shape, spec.dtype)
        return found

    @cached_property
    def stored(self) -> dict[str, TensorSpec]:
        found, wholes = self._one_by_one, self._experts
        if not wholes:
            return found
        of_experts = {part: whole for whole, experts in wholes.items() for parts in experts for part in parts}
        return {
            name: spec_of(name, wholes[name], found) if name in wholes else found[name]
            for name in dict.fromkeys(of_experts.get(part, part) for part in found)
        }

    @cached_property
    def _experts(self) -> dict[str, Parts]:
        return experts_in_files(self.family, self._one_by_one)

    @cached_property
    def experts_in_files(self) -> dict[str, Parts]:
        known = self._found
        return {w: [[known[part].name for part in parts] for parts in each] for w, each in self._experts.items()}

    @cached_property
    def name_in_files(self) -> dict[str, str]:
        return {} if self.source else {name: place.name for name, place in self._found.items()}

    def read(self, name: str) -> "torch.Tensor":
        if not (experts := self.experts_in_files.get(name)):
            return self._read_one(Place(name) if name in self.carried else self._found[name])
        import torch

        spec = self.stored[name]
        whole = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        for place, parts in enumerate(experts):
            torch.cat([self.read_from_file(part) for part in parts], out=whole[place])
        return whole

    def _read_one(self, place: Place) -> "torch.Tensor":
        if place.rows is None:
            tensor = self.read_from_file(place.name)
        else:
            import torch

            first, last = int(place.rows[0]), int(place.rows[-1])
            tensor = self.read_from_file(place.name, slice(first, last + 1))
            tensor = tensor.index_select(0, torch.from_numpy(place.rows - first))
        return _normalised(tensor) if place.is_normalised else tensor

    @property
    def _stored_sizes(self) -> list[tuple[str, int]]:
        return [(spec.dtype, spec.nbytes) for spec in (*self.stored.values(), *self.carried.values())]

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

    @property
    def may_open_texts(self) -> bool:
        try:
            whole, said = (read_json(self.path / name) for name in ("tokenizer.json", "tokenizer_config.json"))
            added = re.search("SpecialToken|Bert|Roberta", json.dumps(whole.get("post_processor")))
        except (FlapError, RecursionError):
            return True
        plain = said.get("tokenizer_class") in PLAIN_TOKENIZERS and "auto_map" not in said
        return bool(added or said.get("add_bos_token") or not plain)

    def _load_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        self._refuse_remote_tokenizer()
        known = {"config": self.load_config()} if self.source else {}
        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.hub.trust_remote_code, **known)

    def _refuse_remote_tokenizer(self) -> None:
        """Raise FlapError where only code in the folder knows the tokens: transformers might take others for them."""
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        path = self.path / "tokenizer_config.json"
        told = read_json(path) if path.exists() else {}
        if "auto_map" not in told or self.hub.trust_remote_code or (self.path / "tokenizer.json").exists():
            return
        if tokenizer_class_from_name(str(told.get("tokenizer_class"))) is None:
            raise FlapError(
                f"only code in the folder can read it (auto_map in {path.name}), which flap runs where "
                "--trust-remote-code is given: look at it first, or put the tokenizer.json of a converted one beside it"
            )

    def load_config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        try:
            if self.is_converted:
                return AutoConfig.for_model(**deepcopy(self.config))  # whose dicts it writes into
        except Exception as error:  # each field has a check of its own
            raise FlapError(f"{self.name}: transformers can't read its config.json: {first_line(error)}") from error
        return self._transformers_config()

    def _transformers_config(self) -> "PreTrainedConfig":
        """What transformers makes of config.json as it is."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path)
        except Exception as error:  # as above
            raise FlapError(f"{self.name}: transformers can't read its config.json: {first_line(error)}") from error


def _with_effect(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration, and of those within it, may change what the weights compute."""
    # Sizes of single layers stand under `flap`, and the tensors have them.
    left = {key for key in config if key in (*WITHOUT_EFFECT, *PER_LAYER) or "dropout" in key}
    # Else it is how far a table of positions goes, whose size the tensors have, or how long a text may be.
    if not SCALED_ROTATION.search(json.dumps([config.get("rope_parameters"), config.get("rope_scaling")])):
        left.add("max_position_embeddings")
    inner = {key for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    return {key: _with_effect(value) if key in inner else value for key, value in config.items() if key not in left}


def _normalised(rows: "torch.Tensor") -> "torch.Tensor":
    """Rows divided by their lengths, in the dtype that they are stored in, as Baichuan2's own code does."""
    import torch

    return torch.nn.functional.normalize(rows)
