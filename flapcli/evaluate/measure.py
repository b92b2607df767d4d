"""One model measured: perplexity on each text, and size."""

import gc

import torch

from flapcli.checkpoint.base import Checkpoint
from flapcli.corpus import evaluation_windows
from flapcli.evaluate.perplexity import perplexity
from flapcli.evaluate.report import Measurement, Size
from flapcli.loading import load_model, quiet_transformers
from flapcli.progress import Progress


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
) -> Measurement:
    """Perplexity on each text, and size. Raises FlapError where text or model can't be loaded."""
    quiet_transformers()
    tokenizer = checkpoint.load_tokenizer()
    windows = {text: evaluation_windows(text, tokenizer, seqlen, text_column) for text in texts}
    model = load_model(checkpoint, dtype, device)
    values = {
        text: perplexity(model, tokens, batch_size, progress, f"{label} on {text}") for text, tokens in windows.items()
    }
    del model
    gc.collect()
    size = Size(parameters=checkpoint.shape.parameters, bytes=checkpoint.nbytes, stored_as=checkpoint.stored_as)
    return Measurement(checkpoint=str(checkpoint.path), perplexity=values, size=size)
