"""What goes through every expert: the forward pass of transformers' experts that shows it on the way."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "flap"
# Of an expert by its number: what goes into its output projection (tokens, neurons), the router's weights of these
# tokens (tokens, 1), and what comes out (tokens, hidden).
Take = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def show_experts(experts: torch.nn.Module, take: Take) -> None:
    """Have a model's experts, run one by one as their own code does, call `take` for each that has tokens."""
    experts.flap_take = take  # type: ignore[assignment]
    if hasattr(experts, "has_gate"):  # one whose way of computing can be chosen
        experts.config._experts_implementation = NAME  # type: ignore[union-attr]
    else:
        experts.forward = partial(_forward_sorted, experts)


def _forward(experts: Any, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(states)
    for expert in range(len(experts.down_proj)):
        tokens, places = torch.where(index == expert)
        if not len(tokens):
            continue
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        made = _project(experts, first, expert, states[tokens])
        x = experts._apply_gate(made) if experts.has_gate else experts.act_fn(made)
        output, share = _project(experts, "down_proj", expert, x), weights[tokens, places, None]
        experts.flap_take(expert, x, share, output)
        result = result.index_add(0, tokens, (output * share).to(result.dtype))
    return result


def _forward_sorted(experts: Any, states: torch.Tensor) -> torch.Tensor:
    """Of experts that take all tokens, one expert's after the other's, weighed: by 0 what does not come to it."""
    results = []
    for expert, every in enumerate(states.unflatten(0, (len(experts.down_proj), -1))):
        tokens = every.any(dim=-1).nonzero().flatten()
        gate, up = (every[tokens] @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        x = up * experts.act_fn(gate)
        output = x @ experts.down_proj[expert]
        if len(tokens):
            experts.flap_take(expert, x, torch.ones_like(x[:, :1]), output)
        results.append(torch.zeros_like(every).index_add(0, tokens, output))
    return torch.cat(results)


def _project(experts: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return torch.nn.functional.linear(x, weight.T if experts.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
