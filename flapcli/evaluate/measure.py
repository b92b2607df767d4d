"""One model measured: perplexity on each text, tasks, and size."""

import gc
from typing import TYPE_CHECKING

import torch

from flapcli.checkpoint.base import Checkpoint
from flapcli.corpus import evaluation_windows
from flapcli.errors import FlapError
from flapcli.evaluate.perplexity import details, exp_mean, window_losses
from flapcli.evaluate.report import Measurement, Size
from flapcli.evaluate.streamed import streamed_losses
from flapcli.evaluate.suite import average
from flapcli.loading import load_model, quiet_transformers
from flapcli.memory import give_back, should_stream
from flapcli.progress import Progress

if TYPE_CHECKING:
    from flapcli.evaluate.tasks import LoadedTasks, TaskOptions


def measure_model(
    checkpoint: Checkpoint,
    texts: list[str],
    seqlen: int,
    text_column: str,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None,
    progress: Progress,
    label: str,
    tasks: "tuple[LoadedTasks, TaskOptions] | None" = None,
    stream: bool | None = None,
) -> Measurement:
    """Perplexity on each text, `tasks` if any, and size.

    `stream` reads perplexity layer by layer; None decides by the device's memory. Tasks need the whole model.
    Raises FlapError where text or model can't be loaded; a task that can't be run is recorded instead.
    """
    quiet_transformers()
    tokenizer = checkpoint.load_tokenizer()
    windows = {text: evaluation_windows(text, tokenizer, seqlen, text_column) for text in texts}
    model = None
    if should_stream(checkpoint, dtype, device, False, stream, progress):
        if tasks:
            raise FlapError(f"{checkpoint.name}: tasks need the whole model in memory: leave out --tasks or --stream")
        losses = {
            text: streamed_losses(checkpoint, tokens, device, dtype, batch_size, progress, f"{label} on {text}")
            for text, tokens in windows.items()
        }
    else:
        model = load_model(checkpoint, dtype, device)
        losses = {
            text: window_losses(model, tokens, batch_size, progress, f"{label} on {text}")
            for text, tokens in windows.items()
        }
    size = Size(parameters=checkpoint.shape.parameters, bytes=checkpoint.nbytes, stored_as=checkpoint.stored_as)
    found = Measurement(
        checkpoint=str(checkpoint.path),
        perplexity={text: exp_mean(values, f"{label} on {text}") for text, values in losses.items()},
        perplexity_details={text: details(values, windows[text], tokenizer) for text, values in losses.items()},
        size=size,
    )
    if tasks and model is not None:
        from flapcli.evaluate.tasks import run_tasks

        done = run_tasks(model, tokenizer, *tasks, batch_size, progress, label)
        found.tasks, found.task_failures = done.metrics, done.failures
        found.averaged_tasks, found.task_average = average({task: done.metrics[task] for task in done.heads})
    del model
    gc.collect()
    give_back()
    return found
