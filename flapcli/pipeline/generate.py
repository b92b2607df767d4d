"""`flap generate`: the dense and the pruned model's answers to one prompt. Nothing is cached."""

import gc
from dataclasses import dataclass

from flapcli.checkpoint import Hub
from flapcli.pipeline.common import Compute
from flapcli.pipeline.evaluate import dense_of, made_by_of, open_measured
from flapcli.progress import Progress


@dataclass(frozen=True)
class GenerateOptions:
    """How the models go on; `chat` puts the prompt into their chat template."""

    max_new_tokens: int = 64
    sample: bool = False
    seed: int = 0
    temperature: float = 1.0
    chat: bool = False
    dtype: str = "auto"


def run_generate(
    prompt: str,
    checkpoint_name: str,
    model: str | None,
    hub: Hub,
    options: GenerateOptions,
    baseline: bool,
    compute: Compute,
    progress: Progress,
) -> dict[str, str]:
    """Each model's continuation of `prompt`, as `dense` and `pruned` (or `model` alone)."""
    checkpoint = open_measured(checkpoint_name, hub)
    dense = dense_of(made_by_of(checkpoint), model, hub) if baseline else None
    import torch

    from flapcli.device import pick_device, pick_eval_dtype
    from flapcli.evaluate.generate import Sampling, continuation, encode
    from flapcli.loading import load_model, quiet_transformers

    quiet_transformers()
    if compute.threads:
        torch.set_num_threads(compute.threads)
    device = pick_device(compute.device)
    dtype = pick_eval_dtype(options.dtype, device)
    sampling = Sampling(options.max_new_tokens, options.sample, options.seed, options.temperature)
    said = {}
    for label, which in (("dense", dense), ("pruned" if dense else "model", checkpoint)):
        if which is None:
            continue
        tokenizer = which.load_tokenizer()
        ids = encode(tokenizer, prompt, options.chat)
        progress.note(f"{label}: {which.name}")
        said[label] = continuation(load_model(which, dtype, device), tokenizer, ids, sampling)
        gc.collect()
    return said
