"""Fisher information of a gate on every unit: how much the loss feels the unit (METHOD.md, Fisher information)."""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from flapcli.execution.head import loss_and_gradient


def gate_gradients(x: torch.Tensor, gradient: torch.Tensor, channels: int) -> torch.Tensor:
    """dL/dz_tu, (tokens, units) float32, for x and dL/dx (..., units * channels) of any floating dtype."""
    products = x.float() * gradient.reshape(x.shape).float()
    return products.reshape(-1, x.shape[-1] // channels, channels).sum(-1)


def loss_gradient(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, ids: torch.Tensor, start: int = 1
) -> torch.Tensor:
    """dL/d(states) for what the head makes logits of, (batch, seqlen, hidden), and token ids (batch, seqlen).

    Of the tokens from `start` on; the loss is float32 whatever the model runs in.
    """
    targets = ids[:, start:].flatten()

    def loss(rows: torch.Tensor, part: slice) -> torch.Tensor:
        logits = head(rows[None])[0].float()
        return cross_entropy(logits, targets[part].to(logits.device), reduction="sum")

    return loss_and_gradient(states, start, loss)[1]


def track(model: torch.nn.Module) -> None:
    """Have gradients flow through the model's activations, and to none of its weights."""
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
