"""What flap knows of each architecture: one JSON description a family, and the reader of it.

A description says where sizes stand in config.json, which projections produce a module's channels and
which one consumes them, and which tensors stay whole; what it leaves out is that of the family that it is `like`.
`variants` are what holds in its place where config.json has certain values. Adding a family that fits adds a file.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from flapcli.architecture.flap_section import FlapSection
from flapcli.architecture.gguf_form import GgufDescription
from flapcli.architecture.rows import Symbols
from flapcli.architecture.shape import EVERY_MODULE, OWN_SIZES, LayerShape, Module
from flapcli.errors import FlapError
from flapcli.storage.record import Record

FAMILIES = Path(__file__).parent / "families"
MAX_LAYERS, MAX_SIZE = 10**5, 10**8
SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
PER_LAYER = ("per_layer_config", "allow_global_per_layer_attribute_access")  # transformers' words for uneven layers
OF_EXPERTS = ("shared_expert_size", "num_experts", "expert_size")  # read where the description names their keys
Setting = Callable[[str], Any]  # a key of a model's configuration -> its value, None where it has none


def _is_size(name: str, value: object) -> bool:
    """Whether config.json gives what can be a model's size, or nothing."""
    return value is None or (type(value) is int and 0 < value <= (MAX_LAYERS if name == "num_layers" else MAX_SIZE))


class ModuleDescription(Record):
    """One of a layer's two modules, by tensor prefixes below the layer's.

    `output` is the projection whose input's columns are the module's channels, head by head or neuron by neuron.
    `producers` are the projections that make them, `unit_tensors` (by full names) other tensors whose first axis
    follows heads or neurons: each maps to which rows belong to what (`architecture.rows`). `inputs` are the widths of
    what producers read where that is not the residual stream, as expressions. `attributes` of submodules
    must follow a layer's sizes, as expressions of them; one of a configuration that a submodule reads is named with
    `config`, such as `self_attn.config.num_attention_heads`. `head_arguments` are arguments of attention with an entry
    for each head: their axis, on which batch and heads may lie together. `stays_whole` says why its units stay or go
    together alone, such as norms over all of them; None where each can go. `beside` are tensors that are whole where
    the module is.

    `of_experts`: tensors of an axis more, an expert each, (in, out) where `transposed`, of a submodule that
    transformers calls with tokens, the experts that each goes to and their weights. `files` are the names, `{e}` being
    an expert's number, of what files hold for a tensor expert by expert, in parts whose rows lie one after the other.
    `every_expert` says why whole experts can't go.
    """

    output: str
    producers: dict[str, Symbols]
    unit_tensors: dict[str, Symbols] = Field(default={})
    inputs: dict[str, str] = Field(default={})
    attributes: dict[str, str] = Field(default={})
    head_arguments: dict[str, int] = Field(default={})
    stays_whole: str | None = None
    beside: list[str] = Field(default=[])
    transposed: bool = False
    of_experts: bool = False
    files: dict[str, list[str]] = Field(default={})
    every_expert: str | None = None

    def weight(self, projection: str) -> str:
        """The full name, below the layer's prefix, of one of its projections' weight."""
        return projection if self.of_experts else f"{projection}.weight"

    def bias(self, projection: str) -> str:
        return f"{projection}_bias" if self.of_experts else f"{projection}.bias"

    @property
    def tensors(self) -> dict[str, Symbols]:
        """All that is cut to the units that stay but the output projection: prefixes, and full names."""
        return self.producers | self.unit_tensors


class Refusal(Record):
    """A value of config.json that makes a model one that flap can't prune, and why."""

    key: str
    values: list[Any]
    why: str


class Family(Record):
    """A model family, by its `name`, the model_type of config.json. `sizes` maps our names of sizes to the keys that
    it has, to a number that they always are, or to a product of keys that tensors are checked by.

    `decoder` and `layer` are prefixes of tensor names, the latter with the layer's index. `between_modules` is the
    layer's submodule whose input is the residual stream between attention and MLP; None where both read the same stream
    and add to it side by side. `per_layer_lists` are the configuration's lists of one entry for each layer,
    `leading_layer_counts` its numbers of first layers that differ from the rest, `depth_scales` its factors that the
    model divides by this power of the number of layers: what must follow where whole layers are dropped; in its
    `patterns` of layers `experts` stands for the indices of those that have some, `-experts` of the others.
    `untouched_in_layer` (below the layer's prefix) and `outside_layers` hold tensors that pruning leaves whole, the
    embedding first; names that end in `ignored_suffixes` no runtime reads. `bias_options` maps a module to the
    configuration's switch that gives all its projections biases. `stored_names` turns names of tensors in files into
    those of the model, by regular expressions and what they are replaced by. `transposed`: projections are stored (in,
    out). `norms_stream`: a layer does more to the residual stream than add to it, so that one without units is no
    layer less. `alters_outputs`: norms or factors stand between output projections and the stream. Where there are
    `experts`, a layer has those modules that its tensors show. `refuses` are values of config.json that flap can't
    prune, and why. `follow` are what else of config.json follows the sizes of a stock folder, as expressions. `notes`
    are for people.
    """

    name: str
    covers: str
    architecture: str
    sizes: dict[str, str | int]
    decoder: str
    layer: str
    attention: ModuleDescription
    mlp: ModuleDescription
    between_modules: str | None
    per_layer_lists: list[str]
    leading_layer_counts: list[str]
    depth_scales: dict[str, float]
    bias_options: dict[Module, str]
    untouched_in_layer: list[str]
    ignored_suffixes: list[str]
    head: str
    outside_layers: list[str]
    gguf: GgufDescription
    stored_names: list[tuple[str, str]]
    transposed: bool
    norms_stream: bool
    alters_outputs: bool
    refuses: list[Refusal]
    notes: str
    follow: dict[str, str] = Field(default={})
    patterns: dict[str, int | str] = Field(default={})
    shared_expert: ModuleDescription | None = None
    experts: ModuleDescription | None = None

    @property
    def fits_sequentially(self) -> bool:
        """Whether what a module adds to the stream is its output projection's output, attention first."""
        does_more = self.alters_outputs or self.norms_stream or self.experts is not None
        return self.between_modules is not None and not does_more

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that its layers have, or some of them."""
        return tuple(module for module in EVERY_MODULE if getattr(self, module))

    def module(self, module: Module) -> ModuleDescription:
        return getattr(self, module)

    def output(self, layer: int, module: Module) -> str:
        """Full prefix of a module's output projection, such as `model.layers.0.mlp.down_proj`."""
        return f"{self.layer.format(i=layer)}.{self.module(module).output}"

    def output_weight(self, layer: int, module: Module) -> str:
        """Full name of the weight of a module's output projection."""
        return f"{self.layer.format(i=layer)}.{self.module(module).weight(self.module(module).output)}"

    def read_sizes(self, setting: Setting, width: int | None = None) -> dict[str, int]:
        """Sizes of the architecture: those of config.json, and what its class of transformers makes of missing ones.

        `width` is the MLP's as its tensors have it, for a family whose configuration need not say it.
        Raises FlapError that lists every missing size, and every value that is none.
        """
        keys = {name: key for name, key in self.sizes.items() if isinstance(key, str) and "*" not in key}
        names = (*SIZES, *(name for name in OF_EXPERTS if name in keys))
        sizes: dict[str, Any] = {n: setting(keys[n]) if n in keys else self.sizes.get(n) for n in names}
        odd = [f"{keys.get(name)} is {value!r:.80}" for name, value in sizes.items() if not _is_size(name, value)]
        if odd:
            raise FlapError(f"config.json of a {self.name} model: {', '.join(odd)}, where a whole number is wanted")
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
        sizes["intermediate_size"] = sizes["intermediate_size"] or width
        if sizes["head_dim"] is None and sizes["hidden_size"] and sizes["num_attention_heads"]:
            sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        missing = [keys.get(name, name) for name, value in sizes.items() if value is None]
        if missing:
            raise FlapError(f"config.json of a {self.name} model lacks {', '.join(missing)}")
        return {name: int(value) for name, value in sizes.items() if value is not None}

    def read_layers(self, sizes: dict[str, int], flap: FlapSection | None) -> tuple[LayerShape, ...]:
        """Each layer's own sizes: those under `flap` where the model was pruned, else the architecture's."""
        count = sizes["num_layers"]
        if flap is None:
            return (LayerShape(*(sizes[size] for size in OWN_SIZES)),) * count
        layers = tuple(flap.layers())
        if len(layers) != count:
            raise FlapError(f"config.json: the per-layer sizes under `flap` are not {count} values each")
        return layers


def renamed(name: str, patterns: list[tuple[str, str]]) -> str:
    """A name after all replacements of regular expressions."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


@cache
def families() -> dict[str, Family]:
    """All descriptions in the folder families/, each without its variants; `_` begins what several are `like`."""
    files = (path.stem for path in sorted(FAMILIES.glob("*.json")) if not path.stem.startswith("_"))
    return {name: Family.model_validate(_description(name)[0]) for name in files}


@cache
def _description(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A file of families/, over that of the family that it is `like`, and its variants, or else that one's."""
    own = json.loads((FAMILIES / f"{name}.json").read_bytes())
    base, variants = _description(own.pop("like")) if "like" in own else ({}, [])
    variants = own.pop("variants", variants)
    return _over(base, own), variants


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A description over another; modules, `gguf` and its forms are taken key by key."""
    merged = base | own
    for key in ("gguf", *EVERY_MODULE):
        if key in merged:
            merged[key] = base.get(key, {}) | own.get(key, {})
    for key in ("own", "uneven"):
        forms = [description.get("gguf", {}).get(key) for description in (base, own)]
        if all(isinstance(form, dict) for form in forms):
            merged["gguf"][key] = forms[0] | forms[1]
    return merged


@cache
def refused_families() -> dict[str, str]:
    """Model types that flap can't prune, and why."""
    return json.loads((FAMILIES / "_refused.json").read_bytes())


def family_of(model_type: object, setting: Setting, where: str, overrides: Mapping[str, Any] | None = None) -> Family:
    """The family of a configuration, in its variant, with `overrides` in place of what its description says.

    Raises FlapError for an unknown one, never guesses.
    """
    if why := refused_families().get(str(model_type)):
        raise FlapError(f"{where}: model_type {model_type} can't be pruned: {why}")
    if not (family := families().get(str(model_type))):
        known = ", ".join(families())
        raise FlapError(
            f"{where}: model_type {json.dumps(model_type):.80} is not supported; flap prunes: {known}; "
            f"a new family takes a description of its own beside those in {FAMILIES}"
        )
    description, variants = _description(family.name)
    for changes in chosen(variants, setting):
        description = _over(description, changes)
    family = Family.model_validate(_over(description, dict(overrides or {})))
    refuse(family.refuses, setting, where)
    return family


def chosen(variants: list[dict[str, Any]], setting: Setting) -> Iterator[dict[str, Any]]:
    """What is other in a configuration's variants: those `when` keys have such values, or `unless` they have."""
    for variant in variants:
        conditions = [(variant.get(word, {}), word == "when") for word in ("when", "unless")]
        if all((setting(key) in values) == wanted for found, wanted in conditions for key, values in found.items()):
            yield {key: value for key, value in variant.items() if key not in ("when", "unless")}


def refuse(refusals: list[Refusal], setting: Setting, where: str) -> None:
    """Raise FlapError for a configuration with one of these values."""
    for refusal in refusals:
        if (value := setting(refusal.key)) in refusal.values:
            raise FlapError(f"{where}: {refusal.key} is {value!r:.80}, which flap does not prune: {refusal.why}")


def family_of_gguf(architecture: str, where: str) -> Family:
    """The family of a GGUF file's `general.architecture`; the first, where several share one (llama)."""
    read = {f.gguf.own.architecture: f for f in reversed(families().values()) if f.gguf.own and f.gguf.own.read}
    if architecture not in read:
        known = ", ".join(sorted(read))
        raise FlapError(f"{where}: GGUF architecture {architecture!r:.80} is not supported; flap reads: {known}")
    return read[architecture]
