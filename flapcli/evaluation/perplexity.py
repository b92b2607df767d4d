"""Perplexity (METHOD.md, Perplexity): exp of the mean cross entropy over the predicted tokens of each window."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from flapcli.artifacts.eval_report import Divergence, TextDetails
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.evaluation.reference import Beside
from flapcli.execution.batches import STREAM, Batches, Within
from flapcli.execution.device import Runtime
from flapcli.execution.head import cached_rows
from flapcli.execution.hidden_states import ResidualStream
from flapcli.execution.layerwise import Forward, LayerwiseModel
from flapcli.progress import Progress
from flapcli.storage.atomic import explain
from flapcli.storage.resume import Resume
from flapcli.texts.opening import first_predicted, opening, opening_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def window_losses(
    model: PreTrainedModel,
    windows: NDArray[np.int64],
    batch_size: int | None,
    progress: Progress,
    description: str = "perplexity",
    start: int = 1,
    layers: Sequence[torch.nn.Module] = (),
    beside: Beside | None = None,
) -> NDArray[np.float64]:
    """Mean cross entropy of each of (n, seqlen) windows, (n,), in nats per predicted token: those from `start` on.

    `layers`, the model's, tell how far each batch is, and `beside` sees what the last one puts out. Every window is
    read on its own. Cross entropy in float32, summed in float64. Raises FlapError where it is not finite.
    """
    sums = np.empty(len(windows))

    def step(part: slice) -> None:
        ids = torch.from_numpy(windows[part]).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        sums[part] = loss_sums(logits, ids, start)
        if beside:
            beside.take(part, within.states, logits)

    batches = Batches(windows.shape[1], model.device, batch_size, progress, instead=STREAM)
    task = progress.task(description, windows.size, "tokens")
    with torch.inference_mode(), task as whole, Within(layers, whole) as within:
        batches.run(len(windows), step, within)
    return mean_losses(sums, windows.shape[1] - start, description)


def streamed_losses(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    runtime: Runtime,
    progress: Progress,
    description: str,
    start: int = 1,
    beside: Beside | None = None,
) -> NDArray[np.float64]:
    """What `window_losses` returns, with one layer's weights in memory at a time, then the head's.

    Hidden states of all windows, (n, seqlen, hidden_size), stand in RAM or, where that is short, in files. Raises
    FlapError as that does, and where the disk has no room for these.
    """
    layerwise = LayerwiseModel(checkpoint, windows, runtime, progress)
    device, num_layers = runtime.device, checkpoint.shape.num_layers
    files, sums = Resume(runtime.scratch, "perplexity"), np.empty(len(windows))
    hidden = ResidualStream.of(checkpoint, windows, runtime, files)

    def through(part: slice, forward: Forward) -> None:
        hidden.write(part, forward(hidden.read(part)))

    def read(part: slice, logits: Forward) -> None:
        states = hidden.read(part)
        made = logits(states)
        sums[part] = loss_sums(made, layerwise.tokens(part).to(device), start)
        if beside:
            beside.take(part, states, made)

    total = windows.size * (num_layers + 2)
    try:
        with torch.inference_mode(), progress.task(description, total, "tokens x layers") as advance:
            layerwise.embed(hidden.write, advance)
            hidden.turn()
            for layer in layerwise.layers(range(num_layers)):
                layerwise.run(layer, through, advance)
                hidden.turn()
            layerwise.head(read, advance)
    except OSError as error:
        raise explain(error, files.folder) from error
    finally:
        files.discard()
    return mean_losses(sums, windows.shape[1] - start, description)


def loss_sums(logits: torch.Tensor, ids: torch.Tensor, start: int) -> list[float]:
    """Summed cross entropy of each window of a batch; `logits` (batch, seqlen, vocab_size), `ids` (batch, seqlen).

    Of the tokens from `start` on. Window by window at most: a float32 copy of all logits would be the largest tensor of
    the run. Numbers and not tensors, which would lie between the large ones that are freed, and which not every device
    has in float64.
    """
    return [
        sum(
            float(cross_entropy(predicting[rows].float(), tokens[rows], reduction="sum"))
            for rows in cached_rows(predicting)
        )
        for predicting, tokens in zip(logits[:, start - 1 : -1], ids[:, start:], strict=True)
    ]


def mean_losses(sums: NDArray[np.float64], predicted: int, description: str) -> NDArray[np.float64]:
    """Mean loss of each window from its sum over so many tokens. Raises FlapError where one is not finite."""
    means = sums / predicted
    if not np.isfinite(means).all():
        raise FlapError(f"{description}: the loss is not finite; try float32 (--dtype, or --eval-dtype of run)")
    return means


def exp_mean(losses: NDArray[np.float64], description: str = "perplexity") -> float:
    """Perplexity of windows' mean losses. Raises FlapError where it is beyond a float."""
    mean = float(losses.mean())
    try:
        return math.exp(mean)
    except OverflowError as error:
        raise FlapError(f"{description}: mean loss {mean:.1f} is beyond any perplexity; the model is broken") from error


def details(
    losses: NDArray[np.float64],
    windows: NDArray[np.int64],
    tokenizer: "PreTrainedTokenizerBase",
    of_windows: int | None = None,
    dtype: str | None = None,
    divergence: Divergence | None = None,
) -> TextDetails:
    """Standard error and bits per byte beside the perplexity of `windows`, (n, seqlen), with mean `losses`, (n,).

    METHOD.md, Perplexity says what they are; the standard error of one window is 0. The text has `of_windows`, the
    model ran in `dtype`, its `divergence` is that from the dense one.
    """
    count, predicted = len(losses), windows.shape[1] - first_predicted(tokenizer)
    error = losses.std(ddof=1) / math.sqrt(count) if count > 1 else 0.0
    size = predicted_bytes(windows, tokenizer)
    return TextDetails(
        standard_error=exp_mean(losses) * float(error),
        bits_per_byte=float(losses.sum()) * predicted / math.log(2) / size if size else 0.0,
        windows=count,
        tokens=windows.shape[0] * predicted,
        bytes=size,
        begins_with=opening_text(tokenizer),
        of_windows=None if of_windows == count else of_windows,
        dtype=dtype,
        divergence=divergence,
    )


def predicted_bytes(windows: NDArray[np.int64], tokenizer: "PreTrainedTokenizerBase") -> int:
    """UTF-8 bytes of the windows' text without each first token's, which nothing predicts, where windows begin with it.

    A character that a window's edge cuts in two decodes to a replacement character of three bytes: at most
    two bytes too many an edge.
    """
    if before := len(opening(tokenizer)):
        # In their place any token: decoders may drop the space that a text begins with.
        windows = np.concatenate([windows[:, -1:], windows[:, before:]], axis=1)
    first, whole = (
        tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (windows[:, :1], windows)
    )
    return sum(len(text.encode()) for text in whole) - sum(len(text.encode()) for text in first)
