"""Block influence: how much a decoder layer, or one of its modules, turns the residual stream (METHOD.md, Depth)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flapcli.architecture.family import Family


@torch.no_grad()
def stream_changes(before: torch.Tensor, middle: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity of every token's residual stream, (tokens, 3) float32.

    The stream (..., hidden) is that before a layer, between its attention and its MLP, and after it; the columns
    are those of `artifacts.stats.Influence`: the layer, its attention, its MLP. A stream of zeros counts as turned.
    """
    size = after.shape[-1]
    stacked = torch.empty(after.numel() // size, 3, size, dtype=torch.float32, device=after.device)
    for place, stream in enumerate((before, middle, after)):  # float32 and side by side in one pass
        stacked[:, place] = stream.reshape(-1, size)
    # All products of the three at once: several times as fast as three cosine similarities. Rows are taken one by one,
    # since lists of them would have to be copied to a GPU, which the host would wait for.
    products = (stacked @ stacked.transpose(1, 2)).flatten(1).T
    first, second, third = products[::4].sqrt()
    scale = torch.stack((first * third, first * second, second * third)).clamp_min_(torch.finfo(torch.float32).tiny)
    return (1 - torch.stack((products[2], products[1], products[5])) / scale).T


def observe_layer(layer: nn.Module, family: Family, take: Callable[[torch.Tensor], None]) -> list[RemovableHandle]:
    """Call `take` with the layer's `stream_changes` after each of its forward passes; returns what ends that.

    Where its modules stand side by side, the stream between them is its input with what attention adds. Where what
    shows the stream was not called, the layer only passed its input on (as `execution.layerwise` has it), and nothing
    is taken.
    """
    seen: list[torch.Tensor] = []

    def note(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[:] = inputs[:1]

    def compare(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if seen:
            before = args[0] if args else kwargs["hidden_states"]
            middle = seen.pop() if family.between_modules else before + seen.pop()
            take(stream_changes(before, middle, output[0] if isinstance(output, tuple) else output))

    begin = layer.register_forward_pre_hook(lambda *_: seen.clear())  # of a pass that failed half-way
    if family.between_modules:
        middle = layer.get_submodule(family.between_modules).register_forward_pre_hook(note)
    else:
        attention = layer.get_submodule(family.attention.output)
        middle = attention.register_forward_hook(lambda module, _inputs, output: note(module, (output,)))
    return [begin, middle, layer.register_forward_hook(compare, with_kwargs=True)]
