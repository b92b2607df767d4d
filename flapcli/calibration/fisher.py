"""Fisher information of a gate on every unit: how much the loss feels the unit (METHOD.md, Fisher information)."""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

TOKENS = 256  # tokens whose logits exist at once


def gate_gradients(x: torch.Tensor, gradient: torch.Tensor, channels: int) -> torch.Tensor:
    """dL/dz_tu, (tokens, units) float32, for x and dL/dx (..., units * channels) of any floating dtype."""
    products = x.float() * gradient.reshape(x.shape).float()
    return products.reshape(-1, x.shape[-1] // channels, channels).sum(-1)


def loss_gradient(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, ids: torch.Tensor, start: int = 1
) -> torch.Tensor:
    """dL/d(states) for what the head makes logits of, (batch, seqlen, hidden), and token ids (batch, seqlen).

    Of the tokens from `start` on; the loss is float32 whatever the model runs in. Positions that predict none of these,
    as the last of a window, have zeros.
    """
    predicting = slice(start - 1, -1)
    rows = states[:, predicting].flatten(0, 1).detach()
    targets = ids[:, start:].flatten()
    parts = []
    for part, target in zip(rows.split(TOKENS), targets.split(TOKENS), strict=True):
        with torch.enable_grad():
            leaf = part.requires_grad_()
            logits = head(leaf[None])[0].float()
            loss = cross_entropy(logits, target.to(logits.device), reduction="sum")
        parts += torch.autograd.grad(loss, leaf)
    gradient = torch.zeros_like(states)
    gradient[:, predicting] = torch.cat(parts).view_as(gradient[:, predicting])
    return gradient


def track(model: torch.nn.Module) -> None:
    """Have gradients flow through the model's activations, and to none of its weights."""
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
