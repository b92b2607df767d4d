"""Loads a checkpoint pruned by flap: a transformers causal LM whose layers have sizes of their own.

This file is copied into every pruned folder as modeling_flap.py, so that
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` works without flap. The class of a
folder, such as FlapLlamaForCausalLM, is made from the transformers class of the same name.
"""

import functools
import re
from typing import Any

import torch
import transformers
from torch import nn


class Constant(nn.Module):
    """An output projection without inputs: its bias, or zero. Called, so that offloading loads the bias in time.

    Its weight has no columns. It is stored so that the dense model's own class can't take the folder, which would
    put random weights in the place of what was pruned. Folders of older versions do without.
    """

    bias: nn.Parameter | None

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.register_parameter("bias", nn.Parameter(torch.zeros(size)) if bias else None)
        self.register_buffer("weight", torch.zeros(size, 0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}weight", self.weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like) if self.bias is None else self.bias.expand_as(like)


class Emptied(nn.Module):
    """What is left of a module whose units are all pruned: its output projection's bias, or zero."""

    def __init__(self, hidden_size: int, output: str, bias: bool, layer: int | None) -> None:
        super().__init__()
        self.output, self.layer = output, layer
        self.add_module(output, Constant(hidden_size, bias))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        result = self.get_submodule(self.output)(hidden_states)
        if self.layer is None:
            return result
        # A cache counts tokens by its layers' keys, so a layer without heads stores one empty channel. That of
        # continuous batching counts by itself.
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if isinstance(cache, transformers.Cache):
            keys = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(keys, keys, self.layer)
        return result, None


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

    _keys_to_ignore_on_load_missing: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for index, layer in enumerate(self.get_decoder().layers):  # type: ignore[attr-defined]
            for description in config.flap["modules"]:
                _resize(layer, index, description, config)
        named = self.named_modules()  # type: ignore[attr-defined]
        marks = {re.escape(f"{name}.weight") for name, module in named if isinstance(module, Constant)}
        self._keys_to_ignore_on_load_missing = {*(self._keys_to_ignore_on_load_missing or ()), *marks}


def _resize(layer: nn.Module, index: int, description: dict[str, Any], config: Any) -> None:
    """Give one module of one layer its pruned sizes."""
    flap = config.flap
    output = description["output"]
    parent, _, leaf = output.rpartition(".")
    dense = layer.get_submodule(output)
    bias = dense.bias is not None or output in flap["biases"]
    widths = {name: flap[size][index] * description["rows"][size] for name, size in description["producers"].items()}
    if not any(widths.values()):
        attention = description["kind"] == "attention"
        layer.set_submodule(parent, Emptied(config.hidden_size, leaf, bias, index if attention else None))
        return
    for name, rows in widths.items():
        old = layer.get_submodule(name)
        layer.set_submodule(name, _linear(old, config.hidden_size, rows, old.bias is not None))
    channels = widths[description["channels"]]
    layer.set_submodule(output, _linear(dense, channels, config.hidden_size, bias))
    missing = config.num_key_value_heads - flap["num_key_value_heads"][index]
    if missing and description["kind"] == "attention":
        layer.get_submodule(parent).register_forward_pre_hook(functools.partial(_widen, missing), with_kwargs=True)


def _widen(missing: int, _attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Give attention the cache that it can write its fewer heads to."""
    cache = kwargs.get("cache")
    if cache is None or isinstance(cache, transformers.Cache):
        return None
    return args, kwargs | {"cache": Padded(cache, missing)}


def _linear(old: nn.Module, columns: int, rows: int, bias: bool) -> nn.Linear:
    like = old.weight
    return nn.Linear(columns, rows, bias=bias, dtype=like.dtype, device=like.device)


def __getattr__(name: str) -> type:
    """FlapXForCausalLM for any transformers XForCausalLM, made when first asked for."""
    if not (name.startswith("Flap") and name.endswith("ForCausalLM")):
        raise AttributeError(name)
    base = getattr(transformers, name.removeprefix("Flap"))
    made = type(name, (PrunedMixin, base), {"__module__": __name__, "__doc__": f"{base.__name__}, pruned by flap."})
    globals()[name] = made
    return made
