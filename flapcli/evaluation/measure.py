"""One model measured: perplexity on each text, tasks, and size."""

import gc
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flapcli.artifacts.eval_report import Measurement, Size
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.evaluation.perplexity import details, exp_mean, streamed_losses, window_losses
from flapcli.execution.device import Runtime
from flapcli.execution.loading import load_model, quiet_transformers
from flapcli.execution.memory import Demand, give_back, should_stream
from flapcli.execution.settings import EvalOptions
from flapcli.progress import Progress
from flapcli.texts.corpus import evaluation_windows

if TYPE_CHECKING:
    from flapcli.evaluation.tasks import Tasks


def measure_model(
    checkpoint: Checkpoint,
    label: str,
    options: EvalOptions,
    tasks: "Tasks | None",
    stream: bool | None,
    runtime: Runtime,
    progress: Progress,
) -> Measurement:
    """A model's perplexity on each of the options' texts, its size, and what `tasks` give; `label` names it in bars.

    `stream` reads perplexity layer by layer; None decides by the device's memory. Raises FlapError where text or model
    can't be loaded, and for tasks of a streamed model; a task that can't be run is recorded instead.
    """
    quiet_transformers()
    tokenizer = checkpoint.load_tokenizer()
    seqlen, column = options.seqlen, options.text_column
    windows = {text: evaluation_windows(text, tokenizer, seqlen, column) for text in options.perplexity}
    for tokens in windows.values():
        checkpoint.refuse_ids(tokens)
    streamed = should_stream(checkpoint, runtime, Demand(options.seqlen, logits=True), stream, progress)
    if streamed and tasks:
        raise FlapError(f"{checkpoint.name}: tasks need the whole model in memory: leave out --tasks or --stream")
    model = None if streamed else load_model(checkpoint, runtime.dtype, runtime.device)
    losses: dict[str, NDArray[np.float64]] = {}
    for text, tokens in windows.items():
        name = f"{label} on {text}"
        if model is None:
            losses[text] = streamed_losses(checkpoint, tokens, runtime, progress, name)
        else:
            losses[text] = window_losses(model, tokens, runtime.batch_size, progress, name)
    found = Measurement(
        checkpoint=str(checkpoint.path),
        perplexity={text: exp_mean(values, f"{label} on {text}") for text, values in losses.items()},
        perplexity_details={text: details(values, windows[text], tokenizer) for text, values in losses.items()},
        size=Size(parameters=checkpoint.shape.parameters, bytes=checkpoint.nbytes, stored_as=checkpoint.stored_as),
    )
    if tasks and model is not None:
        tasks.run(found, model, tokenizer, runtime.batch_size, progress, label)
    del model
    gc.collect()
    give_back()
    return found
