"""How sure a pruned model may be of its predictions: one factor on all logits (METHOD.md, Sharpness)."""

import torch

from flapcli.checkpoints import Checkpoint
from flapcli.execution.head import TOKENS, cached_rows
from flapcli.execution.hidden_states import ResidualStream
from flapcli.execution.layerwise import Forward, LayerwiseModel
from flapcli.progress import Advance

STEPS = 2  # of Newton's method
ENOUGH = 8192  # tokens for a single number, evenly spread over all


def final_norm_of(checkpoint: Checkpoint) -> list[str]:
    """The tensors of the norm behind the last layer, weight first; none of a model whose norm has no weights."""
    size = (checkpoint.shape.hidden_size,)
    known = {name for name, spec in checkpoint.tensors.items() if spec.shape == size}
    norms = [name for name in checkpoint.family.outside_layers if f"{name}.weight" in known]
    return [name for leaf in ("weight", "bias") if norms and (name := f"{norms[-1]}.{leaf}") in known]


def derivatives(dense: torch.Tensor, pruned: torch.Tensor, factor: float) -> torch.Tensor:
    """First and second derivative by t of KL(softmax(z) || softmax(t z')) at t = `factor`, (2,), summed over rows.

    z and z' are logits (rows, vocabulary).
    """
    own = pruned.float()
    p, q = dense.float().softmax(-1), (factor * own).softmax(-1)
    mean = (q * own).sum(-1, keepdim=True)
    slope = mean[:, 0] - (p * own).sum(-1)
    return torch.stack([slope.sum(), (q * (own - mean).square()).sum()]).cpu().double()


def sharpness(
    layerwise: LayerwiseModel, dense: ResidualStream, pruned: ResidualStream, names: list[str], advance: Advance
) -> float | None:
    """The factor t, where as much more of the norm's weights `names` is as much more of all logits, else None."""
    if not _scale_logits(layerwise.model, names, layerwise.logits, pruned.read(slice(0, 1))[:, :TOKENS]):
        layerwise.unload()
        return None
    factor, every = 1.0, -(-layerwise.windows.size // ENOUGH)
    sums = torch.zeros(2, dtype=torch.float64)

    def step(part: slice, logits: Forward) -> None:
        streams = (stream.read(part).flatten(0, 1)[every // 2 :: every].split(TOKENS) for stream in (dense, pruned))
        for states in zip(*streams, strict=True):
            z, own = (logits(each[None])[0] for each in states)
            for rows in cached_rows(own):
                sums.add_(derivatives(z[rows], own[rows], factor))

    for _ in range(STEPS):
        sums.zero_()
        layerwise.head(step, advance)
        factor -= float(sums[0] / sums[1]) if sums[1] > 0 else 0.0
    return factor


def _scale_logits(model: torch.nn.Module, names: list[str], logits: Forward, states: torch.Tensor) -> bool:
    """Whether twice these weights are twice the logits: not where they are what factors exceed 1 by, nor with caps."""
    once = logits(states)
    _multiply(model, names, 2)
    twice = logits(states)
    _multiply(model, names, 0.5)
    return torch.allclose(twice, 2 * once)


def _multiply(model: torch.nn.Module, names: list[str], factor: float) -> None:
    """In memory of their own, since the weights may lie in a file that was mapped."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        weight = torch.nn.Parameter(model.get_parameter(name) * factor, requires_grad=False)
        setattr(model.get_submodule(owner), leaf, weight)
