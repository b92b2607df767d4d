"""Loads a checkpoint pruned by flap: a transformers causal LM whose layers have sizes of their own.

This file is copied into every pruned folder as modeling_flap.py, so that
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` works without flap. The class of a
folder, such as FlapLlamaForCausalLM, is made from the transformers class of the same name.
"""

import functools
from typing import Any

import torch
import transformers
from torch import nn


class NoExperts(nn.Module):
    """What is left of experts that are all pruned: nothing, whatever the router says."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class LayerConfig:
    """A model's configuration with some values of a layer's own; all others stay the model's, also once they change."""

    def __init__(self, config: Any) -> None:
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("_config"), name)


class Padded:
    """The cache of continuous batching, where all layers have the configuration's heads, for a layer of fewer."""

    def __init__(self, cache: Any, missing: int) -> None:
        self.cache, self.missing = cache, missing

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        own = keys.shape[1]
        wide = (nn.functional.pad(states, (0, 0, 0, 0, 0, self.missing)) for states in (keys, values))
        keys, values = self.cache.update(*wide, *args, **kwargs)
        return keys[:, :own], values[:, :own]


class PrunedMixin:
    """Rebuilds a dense model's projections in the per-layer sizes that config.flap says."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        place = config.flap.get("decoder_layers", "model.layers")
        if not _has(self, place):  # type: ignore[arg-type]  # a model without a head is what its first part names
            place = place.partition(".")[2]
        for index, layer in enumerate(self.get_submodule(place)):  # type: ignore[attr-defined]
            for description in config.flap["modules"]:
                _resize(layer, index, description, config)


def _resize(layer: nn.Module, index: int, description: dict[str, Any], config: Any) -> None:
    """Give one module of one layer its pruned sizes."""
    flap, is_attention = config.flap, description["kind"] == "attention"
    output = description["output"]
    parent = output.rpartition(".")[0]
    if description.get("experts") or not _has(layer, output):
        if _has(layer, parent) and description.get("experts"):
            _resize_experts(layer, index, description, config)
        return
    dense = layer.get_submodule(output)
    bias = dense.bias is not None or output in flap["biases"]
    rows = {name: _rows(flap, description, counted, index) for name, counted in description["producers"].items()}
    for name, count in rows.items():
        old = layer.get_submodule(name)
        layer.set_submodule(name, _projection(old, _columns(old), count, old.bias is not None))
    counted = description["channels"]
    channels = rows[counted] if isinstance(counted, str) else counted[index]
    layer.set_submodule(output, _projection(dense, channels, _width(dense), bias))
    _resize_others(layer, index, description)
    if is_attention:
        _fit_arguments(layer.get_submodule(parent), index, description, config)


def _has(module: nn.Module, path: str) -> bool:
    """Whether a module has this submodule: where there are experts, not all layers have the same."""
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False


def _resize_others(layer: nn.Module, index: int, description: dict[str, Any]) -> None:
    """What follows a module's sizes besides its projections."""
    for name, counts in (description.get("unit_tensors") or {}).items():
        owner, _, attribute = name.rpartition(".")
        _cut(layer.get_submodule(owner), attribute, {0: counts[index]})
    for path, values in (description.get("attributes") or {}).items():
        _set(layer, path, values[index])


def _cut(owner: nn.Module, name: str, sizes: dict[int, int]) -> None:
    """Give a parameter or a buffer other sizes at some axes."""
    whole = getattr(owner, name)
    made = whole.new_empty([sizes.get(axis, size) for axis, size in enumerate(whole.shape)])
    setattr(owner, name, nn.Parameter(made) if isinstance(whole, nn.Parameter) else made)


def _resize_experts(layer: nn.Module, index: int, description: dict[str, Any], config: Any) -> None:
    """Give all experts of a layer, whose tensors have an axis more, their sizes.

    vLLM gives them those of the configuration, whatever is made here, and would fill up what pruned ones lack with
    whatever the memory holds.
    """
    path, _, output = description["output"].rpartition(".")
    count, inner, outer = description["experts"][index], 1, 2
    if not count:
        layer.set_submodule(path, NoExperts())
        return
    if description.get("transposed"):
        inner, outer = outer, inner
    owner = layer.get_submodule(path)
    dense, made = getattr(owner, output).shape, (count, description["channels"][index])
    if made != (dense[0], dense[outer]) and config.get_text_config()._attn_implementation == "vllm":
        raise ValueError("vLLM can't serve experts that are pruned unevenly: it sizes those of all layers alike")
    if description["channels"][index] % 8 and hasattr(owner, "config"):  # which grouped matrix products ask for
        owner.config._experts_implementation = "eager"  # type: ignore[union-attr]
    _cut(owner, output, {0: count, outer: description["channels"][index]})
    sizes = {name.rpartition(".")[2]: rows[index] for name, rows in description["producers"].items()}
    for name, rows in sizes.items():
        _cut(owner, name, {0: count, inner: rows})
    for name, rows in (sizes | {output: 0}).items():
        if hasattr(owner, f"{name}_bias"):
            _cut(owner, f"{name}_bias", {0: count} | ({1: rows} if rows else {}))
    _resize_others(layer, index, description)


def _rows(flap: dict[str, Any], description: dict[str, Any], counted: Any, index: int) -> int:
    """A producer's rows: those of what it counts, or as they are listed layer by layer."""
    return flap[counted][index] * description["rows"][counted] if isinstance(counted, str) else counted[index]


def _set(layer: nn.Module, path: str, value: int) -> None:
    """Set an attribute of a submodule, or of the configuration that it reads."""
    owner, _, name = path.rpartition(".")
    if owner.endswith(".config"):
        reader = layer.get_submodule(owner.removesuffix(".config"))
        if not isinstance(reader.config, LayerConfig):
            reader.config = LayerConfig(reader.config)  # type: ignore[assignment]
        setattr(reader.config, name, value)
    else:
        setattr(layer.get_submodule(owner), name, value)


def _fit_arguments(attention: nn.Module, index: int, description: dict[str, Any], config: Any) -> None:
    """Give attention, before each call, what it takes for its own heads of what is made for the configuration's."""
    of_text = config.get_text_config()
    heads = of_text.num_attention_heads
    missing = (getattr(of_text, "num_key_value_heads", None) or heads) - config.flap["num_key_value_heads"][index]
    if missing:
        attention.register_forward_pre_hook(functools.partial(_widen, missing), with_kwargs=True)
    if axes := description.get("head_arguments"):
        kept = torch.tensor(description["kept_heads"][index], device="cpu")
        attention.register_forward_pre_hook(functools.partial(_cut_arguments, axes, heads, kept), with_kwargs=True)


def _cut_arguments(
    axes: dict[str, int], heads: int, kept: torch.Tensor, _attention: nn.Module, args: Any, kwargs: dict[str, Any]
) -> Any:
    """The kept heads' entries of arguments on whose axis all heads lie, perhaps after those of a batch."""
    cut = {name: kwargs[name] for name in axes if isinstance(kwargs.get(name), torch.Tensor)}
    for name, whole in cut.items():
        axis = axes[name] % whole.ndim
        if (size := whole.shape[axis]) % heads or size == 1:
            continue  # one entry for all heads
        apart = whole.unflatten(axis, (size // heads, heads))
        cut[name] = apart.index_select(axis + 1, kept.to(whole.device)).flatten(axis, axis + 1)
    return args, kwargs | cut


def _widen(missing: int, _attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Give attention the cache that it can write its fewer heads to."""
    cache = kwargs.get("cache")
    if cache is None or isinstance(cache, transformers.Cache):
        return None
    return args, kwargs | {"cache": Padded(cache, missing)}


def _is_transposed(projection: nn.Module) -> bool:
    """Whether weights are stored (in, out), as GPT-2's are."""
    return isinstance(projection, transformers.pytorch_utils.Conv1D)


def _width(projection: Any) -> int:
    return projection.weight.shape[-1 if _is_transposed(projection) else 0]


def _columns(projection: Any) -> int:
    return projection.weight.shape[0 if _is_transposed(projection) else -1]


def _projection(old: Any, columns: int, rows: int, bias: bool) -> nn.Module:
    """One like the old one, of other sizes."""
    like = old.weight
    if not _is_transposed(old):
        return nn.Linear(columns, rows, bias=bias, dtype=like.dtype, device=like.device)
    made = transformers.pytorch_utils.Conv1D(rows, columns).to(like.dtype)
    if like.device.type == "meta":
        return made.to_empty(device="meta")
    return made.to(like.device)


def __getattr__(name: str) -> type:
    """FlapX for any class X of transformers' language models, with their head or without, made when first asked for."""
    if not (name.startswith("Flap") and name.endswith(("ForCausalLM", "Model", "ForConditionalGeneration"))):
        raise AttributeError(name)
    base = getattr(transformers, name.removeprefix("Flap"))
    made = type(name, (PrunedMixin, base), {"__module__": __name__, "__doc__": f"{base.__name__}, pruned by flap."})
    globals()[name] = made
    return made
