"""Attention of a window's last token alone, as generating asks for it at every step: two products on a CPU."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class OneQuery(TorchFunctionMode):
    """Within, fewer queries than keys attend by plain products on a CPU, whose fused kernel is slow at so few.

    Query heads that share keys are rows of one product, so keys are read once and never repeated. As wherever attention
    is written out, scores are rounded to the keys' type; the softmax of them is float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is scaled_dot_product_attention and _fits(*args, **options):
            return _by_products(*args, **options)
        return func(*args, **options)


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **options: Any) -> bool:
    """Heads that share keys must have one query each, to be rows of a product, and one mask."""
    if more or query.device.type != "cpu" or options.get("is_causal") or options.get("dropout_p"):
        return False
    if query.dim() != 4 or query.shape[-2] >= key.shape[-2]:
        return False
    mask = options.get("attn_mask")
    one_mask = mask is None or (mask.dim() == 4 and mask.shape[1] == 1)
    return query.shape[1] == key.shape[1] or (query.shape[-2] == 1 and one_mask)


def _by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """What scaled_dot_product_attention returns, (batch, heads, queries, head_dim of values)."""
    heads, queries = query.shape[1:3]
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    scores = (rows @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    made = torch.softmax(scores, -1).to(value.dtype) @ value
    return made.reshape(len(query), heads, queries, -1)
