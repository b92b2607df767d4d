"""One model measured: perplexity on each text, and tasks."""

import gc
from typing import TYPE_CHECKING

from flapcli.artifacts.eval_report import Measurement
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.evaluation.perplexity import details, exp_mean, streamed_losses, window_losses
from flapcli.execution.device import Runtime
from flapcli.execution.loading import layers_of, load_model, quiet_transformers
from flapcli.execution.memory import Demand, give_back, should_stream
from flapcli.execution.settings import EvalOptions
from flapcli.progress import Progress
from flapcli.storage.dtypes import dtype_name
from flapcli.texts.corpus import evaluation_windows, spread
from flapcli.texts.opening import first_predicted

if TYPE_CHECKING:
    from flapcli.evaluation.tasks import Tasks


def measure_model(
    found: Measurement,
    checkpoint: Checkpoint,
    label: str,
    options: EvalOptions,
    tasks: "Tasks | None",
    stream: bool | None,
    runtime: Runtime,
    progress: Progress,
) -> None:
    """Put into `found`, one by one, the options' perplexities and tasks that it lacks; `label` names it in bars.

    `stream` reads perplexity layer by layer; None decides by the device's memory. Raises FlapError where text or model
    can't be loaded, and for tasks of a streamed model; a task that can't be run is recorded instead.
    """
    lacking = [text for text in options.perplexity if text not in found.perplexity]
    if found.averaged_tasks and not found.task_failures:
        tasks = None
    if not (lacking or tasks):
        return
    quiet_transformers()
    tokenizer = checkpoint.load_tokenizer()
    progress.doing(f"reading {', '.join(lacking) or 'tasks'}")
    whole = {text: evaluation_windows(text, tokenizer, options.seqlen, options.text_column) for text in lacking}
    windows = {text: spread(tokens, options.perplexity_windows) for text, tokens in whole.items()}
    for tokens in windows.values():
        checkpoint.refuse_ids(tokens)
    streamed = should_stream(checkpoint, runtime, Demand(options.seqlen, logits=True), stream, progress)
    if streamed and tasks:
        raise FlapError(f"{checkpoint.name}: tasks need the whole model in memory: leave out --tasks or --stream")
    progress.doing(f"loading {label} ({checkpoint.name})")
    model = None if streamed else load_model(checkpoint, runtime.dtype, runtime.device)
    start = first_predicted(tokenizer)
    for text, tokens in windows.items():
        name = f"{label} on {text}"
        if model is None:
            losses = streamed_losses(checkpoint, tokens, runtime, progress, name, start=start)
        else:
            losses = window_losses(
                model, tokens, runtime.batch_size, progress, name, start=start, layers=layers_of(model, checkpoint)
            )
        progress.doing(f"counting bytes of {text}")
        found.perplexity_details[text] = details(losses, tokens, tokenizer, len(whole[text]), dtype_name(runtime.dtype))
        found.perplexity[text] = exp_mean(losses, name)
    if tasks and model is not None:
        tasks.run(found, model, tokenizer, runtime.batch_size, progress, label)
    del model
    gc.collect()
    give_back()
