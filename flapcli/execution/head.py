"""From the decoder's output to logits and a loss, and back: a few tokens at a time, since logits take most memory."""

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from flapcli.execution.loading import in_place_of

CACHED = 2**19  # float32 numbers that a CPU's cache holds
TOKENS = 64  # whose logits exist at once: with a large vocabulary they would be the peak of memory


class _DecoderOutput(MoeModelOutputWithPast):
    """Whatever else a model's own code asks of its decoder is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head_of(model: PreTrainedModel, decoder: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes logits of the decoder's output, scale and cap included: the model's own code after its decoder."""

    def head(states: torch.Tensor) -> torch.Tensor:
        with in_place_of([decoder], lambda *_, **__: _DecoderOutput(last_hidden_state=states)):
            return model(inputs_embeds=states, use_cache=False).logits

    return head


def predicting(states: torch.Tensor, start: int) -> torch.Tensor:
    """Rows (n, hidden) of states (batch, seqlen, hidden) that predict a token from place `start` on."""
    return states[:, start - 1 : -1].flatten(0, 1)


def parts_of(rows: int, size: int = TOKENS) -> Iterator[slice]:
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def cached_rows(logits: torch.Tensor, most: int | None = None) -> Iterator[slice]:
    """Rows of logits (n, vocabulary) to work on at once: all or `most`, on a CPU what its cache holds in float32.

    Whatever takes several passes over a row is up to five times as fast there.
    """
    size = most or len(logits)
    if logits.device.type == "cpu":
        size = min(size, CACHED // logits.shape[-1])
    return parts_of(len(logits), max(1, size))


def loss_and_gradient(
    states: torch.Tensor, start: int, loss_of: Callable[[torch.Tensor, slice], torch.Tensor]
) -> tuple[float, torch.Tensor]:
    """The loss of the predicting rows, and dL/d(states), zero at positions that predict no token from `start` on.

    `loss_of` is given some of the rows, and which ones; it returns the sum of their losses.
    """
    rows = predicting(states, start).detach()
    losses, found = list[torch.Tensor](), list[torch.Tensor]()
    for part in parts_of(len(rows)):
        with torch.enable_grad():
            leaf = rows[part].requires_grad_()
            loss = loss_of(leaf, part)
        found += torch.autograd.grad(loss, leaf)
        losses.append(loss.detach())
    gradient = torch.zeros_like(states)
    gradient[:, start - 1 : -1] = torch.cat(found).view_as(gradient[:, start - 1 : -1])
    return sum(map(float, losses)), gradient


def drawn(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The first token of each row whose cumulated probability exceeds its number in [0, 1), (rows,)."""
    cumulated = probabilities.cumsum(-1)
    aim = numbers.to(cumulated)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, aim, right=True)[:, 0].clamp_(max=cumulated.shape[-1] - 1)
