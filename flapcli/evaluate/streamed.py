"""Perplexity of models bigger than memory: one decoder layer at a time over all windows."""

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.device import Batches
from flapcli.evaluate.perplexity import losses_of, mean_losses
from flapcli.layers import Front, Layers, states_of
from flapcli.loading import empty_model
from flapcli.progress import Progress


def streamed_losses(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None,
    progress: Progress,
    description: str,
) -> NDArray[np.float64]:
    """What `perplexity.window_losses` returns, with one layer's weights in memory, then the head's.

    Hidden states of all windows, (n, seqlen, hidden_size) in `dtype`, stand in RAM. Raises FlapError as that does.
    """
    model = empty_model(checkpoint, dtype, device)
    front = Front(checkpoint, model, device)
    batches = Batches(windows.shape[1], device, batch_size, progress)
    hidden = torch.empty(*windows.shape, checkpoint.shape.hidden_size, dtype=dtype)
    total = windows.size * (checkpoint.shape.num_layers + 2)
    losses: list[torch.Tensor] = []

    def tokens(part: slice) -> torch.Tensor:
        return torch.from_numpy(windows[part])

    def embed(part: slice) -> None:
        hidden[part] = front.run(tokens(part)).cpu()

    def head(part: slice) -> None:
        losses.extend(losses_of(front.logits(hidden[part].to(device)), tokens(part).to(device)))

    with torch.inference_mode(), progress.task(description, total, "tokens x layers") as advance:
        batches.run(len(windows), embed, advance)
        front.unload()
        for index, layer, _ in Layers(checkpoint, model, device).from_(0):

            def step(part: slice, index: int = index, layer: torch.nn.Module = layer) -> None:
                args, kwargs = front.call(index, tokens(part))
                hidden[part] = states_of(layer(hidden[part].to(device), *args, **kwargs)).cpu()

            batches.run(len(windows), step, advance)
        batches.run(len(windows), head, advance)
    return mean_losses(losses, windows, description)
