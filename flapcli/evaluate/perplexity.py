"""Perplexity by METHOD.md: exp of the mean cross entropy over the predicted tokens of each window."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from flapcli.device import for_batches
from flapcli.errors import FlapError
from flapcli.progress import Progress


def perplexity(
    model: PreTrainedModel,
    windows: NDArray[np.int64],
    batch_size: int | None,
    progress: Progress,
    description: str = "perplexity",
) -> float:
    """Perplexity of a causal model on (n, seqlen) windows, each on its own: seqlen - 1 predictions a window.

    Cross entropy in float32, summed in float64. Raises FlapError where it is not finite.
    """
    total = torch.zeros((), dtype=torch.float64)

    def step(batch: torch.Tensor) -> None:
        logits = model(input_ids=batch, use_cache=False).logits
        # Window by window: a float32 copy of all logits would be the largest tensor of the run.
        losses = [
            cross_entropy(row[:-1].float(), ids[1:], reduction="sum").double().cpu()
            for row, ids in zip(logits, batch, strict=True)
        ]
        total.add_(torch.stack(losses).sum())

    with torch.inference_mode():
        for_batches(windows, step, model.device, batch_size, progress, description)
    mean = float(total) / (windows.shape[0] * (windows.shape[1] - 1))
    if not math.isfinite(mean):
        raise FlapError(f"{description}: the loss is not finite; try --dtype float32")
    try:
        return math.exp(mean)
    except OverflowError as error:
        raise FlapError(f"{description}: mean loss {mean:.1f} is beyond any perplexity; the model is broken") from error
