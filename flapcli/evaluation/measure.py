"""One model measured: perplexity on each text, and tasks."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flapcli.artifacts.eval_report import Measurement
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.evaluation.perplexity import details, exp_mean, streamed_losses, window_losses
from flapcli.evaluation.reference import References
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


@dataclass(frozen=True)
class Measuring:
    """How models are measured: their perplexity layer by layer where `stream`; None decides by the device's memory.

    With `references` the first model's predictions are kept, and those of the others are held against them.
    """

    options: EvalOptions
    tasks: "Tasks | None"
    stream: bool | None
    runtime: Runtime
    progress: Progress
    references: References | None = None

    def measure(self, found: Measurement, checkpoint: Checkpoint, label: str, lacking: Sequence[str]) -> None:
        """Put into `found`, one by one, perplexities on the `lacking` texts, and tasks; `label` names it in bars.

        Raises FlapError where text or model can't be loaded, and for tasks of a streamed model; a task that can't be
        run is recorded instead.
        """
        options, runtime, progress = self.options, self.runtime, self.progress
        tasks = None if found.averaged_tasks and not found.task_failures else self.tasks
        if not (lacking or tasks):
            return
        quiet_transformers()
        tokenizer = checkpoint.load_tokenizer()
        progress.doing(f"reading {', '.join(lacking) or 'tasks'}")
        whole = {text: evaluation_windows(text, tokenizer, options.seqlen, options.text_column) for text in lacking}
        windows = {text: spread(tokens, options.perplexity_windows) for text, tokens in whole.items()}
        for tokens in windows.values():
            checkpoint.refuse_ids(tokens)
        streamed = should_stream(checkpoint, runtime, Demand(options.seqlen, logits=True), self.stream, progress)
        if streamed and tasks:
            raise FlapError(f"{checkpoint.name}: tasks need the whole model in memory: leave out --tasks or --stream")
        progress.doing(f"loading {label} ({checkpoint.name})")
        model = None if streamed else load_model(checkpoint, runtime.dtype, runtime.device)
        start = first_predicted(tokenizer)
        for text, tokens in windows.items():
            name = f"{label} on {text}"
            beside = self.references.beside(text, checkpoint, tokens, start) if self.references else None
            if model is None:
                losses = streamed_losses(checkpoint, tokens, runtime, progress, name, start=start, beside=beside)
            else:
                losses = window_losses(
                    model, tokens, runtime.batch_size, progress, name, start=start,
                    layers=layers_of(model, checkpoint), beside=beside,
                )  # fmt: skip
            progress.doing(f"counting bytes of {text}")
            found.perplexity_details[text] = details(
                losses, tokens, tokenizer, len(whole[text]), dtype_name(runtime.dtype), beside.end() if beside else None
            )
            found.perplexity[text] = exp_mean(losses, name)
        if tasks and model is not None:
            tasks.run(found, model, tokenizer, runtime.batch_size, progress, label)
        del model
        gc.collect()
        give_back()
