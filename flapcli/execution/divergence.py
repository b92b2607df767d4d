"""How far next-token distributions are from another model's, a teacher's (METHOD.md, Healing)."""

from dataclasses import dataclass
from typing import Any

import torch

from flapcli.execution.head import cached_rows
from flapcli.execution.settings import Loss

LEAST = -60_000.0  # a log probability of 0 that float16 can hold


@dataclass(frozen=True)
class Likeliest:
    """A teacher's distribution at n places, float32: log probabilities (n, k) of tokens `ids`, (n, k).

    `rest` (n,) is that of all other tokens together. No `ids`: all tokens in order, and no `rest`.
    """

    logprobs: torch.Tensor
    ids: torch.Tensor | None = None
    rest: torch.Tensor | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, k: int | None = None) -> "Likeliest":
        """Of logits (n, vocabulary); k None keeps all."""
        if k is None:
            return cls(torch.log_softmax(logits.float(), -1).clamp_min_(LEAST))
        parts = [_likeliest(logits[rows], k) for rows in cached_rows(logits)]
        logprobs, ids, rest = (torch.cat(each) for each in zip(*parts, strict=True))
        return cls(logprobs.clamp_min_(LEAST), ids, rest.clamp_min_(LEAST))

    def to(self, device: torch.device) -> "Likeliest":
        ids, rest = (None if each is None else each.to(device) for each in (self.ids, self.rest))
        return Likeliest(self.logprobs.to(device), ids, rest)


def _likeliest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log probabilities and ids of the k likeliest tokens, (n, k), and log probability of all others together, (n,)."""
    every = torch.log_softmax(logits.float(), -1)
    logprobs, ids = every.topk(min(k, every.shape[-1]))
    return logprobs, ids, every.exp_().scatter_(-1, ids, 0.0).sum(-1).log()


def divergence(logits: torch.Tensor, teacher: Likeliest) -> torch.Tensor:
    """Kullback and Leibler's divergence from the teacher to `logits` (n, vocabulary) float32, (n,).

    What the teacher leaves out counts as one token more, whose probability is that of all these together.
    """
    if teacher.ids is None or teacher.rest is None:
        return _between(teacher.logprobs, torch.log_softmax(logits, -1))
    if teacher.ids.shape[-1] == logits.shape[-1]:
        return _between(teacher.logprobs, torch.log_softmax(logits, -1).gather(-1, teacher.ids))
    return _FromLikeliest.apply(logits, teacher.logprobs, teacher.ids, teacher.rest[:, None])


class _FromLikeliest(torch.autograd.Function):
    """The divergence with its gradient by the formula: exponents of the vocabulary are taken once, not thrice.

    With q_j the student's, q_R that of all tokens left out, and s = sum of p_j + p_R (1 but for rounding): dKL/dz_j =
    s q_j - p_j for the likeliest, and (s q_R - p_R) q_j / q_R for all others.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, logprobs: torch.Tensor, ids: torch.Tensor, rest: torch.Tensor
    ) -> torch.Tensor:
        likeliest, others = logits.gather(-1, ids), logits.scatter(-1, ids, -torch.inf)
        largest = others.amax(-1, keepdim=True)
        others.sub_(largest).exp_()
        size = others.sum(-1, keepdim=True)
        left_out = largest + size.log()
        whole = torch.logaddexp(likeliest.logsumexp(-1, keepdim=True), left_out)
        ours, ours_rest = likeliest - whole, left_out - whole
        if ctx.needs_input_grad[0]:
            p, p_rest = logprobs.exp(), rest.exp()
            total = p.sum(-1, keepdim=True) + p_rest
            gradient = others.mul_((total * ours_rest.exp() - p_rest) / size)
            ctx.save_for_backward(gradient.scatter_(-1, ids, total * ours.exp() - p))
        return _between(logprobs, ours) + _between(rest, ours_rest)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None], None, None, None


def _between(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(teacher.exp(), teacher - student)


def token_losses(logits: torch.Tensor, ids: torch.Tensor, teacher: Likeliest | None, loss: Loss) -> torch.Tensor:
    """The loss at every place, (n,), of float32 logits (n, vocabulary) and the tokens that follow, (n,)."""
    named = loss.split("+")
    parts = []
    if "kl" in named and teacher is not None:
        parts.append(divergence(logits, teacher))
    if "ce" in named:
        parts.append(torch.nn.functional.cross_entropy(logits, ids, reduction="none"))
    return torch.stack(parts).mean(0)


def state_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of |s - t|^2 / |t|^2, of hidden states (..., hidden) behind one layer."""
    student, teacher = student.float(), teacher.to(student.device).float()
    off, size = (student - teacher).square().sum(-1), teacher.square().sum(-1)
    return (off / size.clamp_min(torch.finfo(torch.float32).tiny)).sum()
