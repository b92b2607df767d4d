"""Block influence: how much a decoder layer, or one of its modules, turns the residual stream.

ShortGPT (Men et al. 2024, arXiv 2403.03853): BI = 1 - mean over tokens of the cosine similarity of what goes
into a block and what comes out of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Take = Callable[[torch.Tensor], None]


@torch.no_grad()
def turns(before: torch.Tensor, middle: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity of every token's residual stream, (tokens, 3) float32.

    The stream (..., hidden) is that before a layer, between its attention and its MLP, and after it; the columns
    are those of `stats.Influence`: the layer, its attention, its MLP. A stream of zeros counts as turned.
    """
    streams = [x.to(after.device).reshape(-1, x.shape[-1]) for x in (before, middle, after)]
    stacked = torch.stack(streams, dim=1).float()
    # All products of the three at once: several times as fast as three cosine similarities.
    products = stacked @ stacked.transpose(1, 2)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    first, second = [0, 0, 1], [2, 1, 2]
    scale = (norms[:, first] * norms[:, second]).clamp_min(torch.finfo(torch.float32).tiny)
    return 1 - products[:, first, second] / scale


def watch(layer: nn.Module, middle: str, take: Take) -> None:
    """Call `take` with the layer's `turns` after each of its forward passes.

    `middle` is the layer's submodule whose input is the stream between its modules. Where that was not called,
    the layer only passed its input on (as `layers.Front` has it), and nothing is taken.
    """
    seen: list[torch.Tensor] = []

    def note(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[:] = inputs[:1]

    def compare(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if seen:
            before = args[0] if args else kwargs["hidden_states"]
            take(turns(before, seen.pop(), output[0] if isinstance(output, tuple) else output))

    layer.register_forward_pre_hook(lambda *_: seen.clear())  # of a pass that failed half-way
    layer.get_submodule(middle).register_forward_pre_hook(note)
    layer.register_forward_hook(compare, with_kwargs=True)
