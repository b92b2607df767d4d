"""Speed of the dense and the pruned model: alternating rounds in one process, medians and spread."""

import gc
import inspect
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from flapcli.architecture.shape import ModelShape
from flapcli.artifacts.eval_report import SpeedCase, SpeedDetails, Speedup, Spread
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.errors import UsageError
from flapcli.execution.device import Runtime
from flapcli.execution.loading import load_model
from flapcli.execution.memory import give_back
from flapcli.execution.settings import SpeedOptions
from flapcli.progress import Advance, Progress
from flapcli.storage.dtypes import dtype_name


def macs_per_token(shape: ModelShape, context: float, vocabulary: int = 0) -> int:
    """Multiply-accumulates of one token's forward pass.

    Every weight of a projection is used once. Attention adds 2 * heads * head_dim * `context` (queries by keys, then
    scores by values), `context` being how many positions the token attends to on average. The output head adds
    hidden_size * `vocabulary`; 0 where it is not computed. Norms, rotations and activations multiply no matrices.
    """
    attention = sum(2 * layer.num_attention_heads * shape.head_dim * context for layer in shape.layers)
    weights = sum(shape.module_weights(i, module) for i in range(shape.num_layers) for module in shape.modules)
    return round(weights + attention + shape.hidden_size * vocabulary)


def odd_width_share(shape: ModelShape, multiple: int = 16) -> float:
    """Share of the layers whose MLP width is no multiple of `multiple`, which matrix kernels may run slower on."""
    widths = [layer.intermediate_size for layer in shape.layers if layer.intermediate_size]
    return sum(width % multiple != 0 for width in widths) / len(widths) if widths else 0.0


class Round(NamedTuple):
    """Tokens per second of one round, over all sequences of the batch."""

    prefill: float
    decode: float


def measure_speed(
    checkpoints: dict[str, Checkpoint], options: SpeedOptions, runtime: Runtime, progress: Progress
) -> tuple[dict[str, SpeedDetails], list[Speedup]]:
    """Time every model of {"pruned": ..., "dense": ...}, or one alone, in turns, all of them in memory at once.

    Turns even out what else the machine does: each round runs the models one after the other on the same
    tokens, in an order that changes every round. Returns each model's figures, and case by case the pruned
    model's gain.
    """
    device = runtime.device
    progress.doing(f"loading {' and '.join(checkpoints)}")
    models = {label: load_model(checkpoint, runtime.dtype, device) for label, checkpoint in checkpoints.items()}
    vocabulary = min(model.config.vocab_size for model in models.values())
    draw = torch.Generator().manual_seed(0)
    total = (options.rounds + 1) * len(options.cases) * len(models)
    rounds: dict[str, list[list[Round]]] = {label: [] for label in models}
    with torch.inference_mode(), progress.task("speed", total, "runs") as advance:
        for case in options.cases:
            prompt = torch.randint(vocabulary, case, generator=draw).to(device)
            for label, found in _in_turns(models, prompt, options, advance).items():
                rounds[label].append(found)
    details = {
        label: _details(checkpoints[label], model, rounds[label], options, runtime) for label, model in models.items()
    }
    models.clear()
    gc.collect()
    give_back()
    gains = [_speedup(rounds, details, place) for place in range(len(options.cases))] if len(details) > 1 else []
    return details, gains


def _in_turns(
    models: dict[str, PreTrainedModel], prompt: torch.Tensor, options: SpeedOptions, advance: Advance
) -> dict[str, list[Round]]:
    """Rounds of every model on one prompt, the first of each left out."""
    found: dict[str, list[Round]] = {label: [] for label in models}
    for number in range(options.rounds + 1):
        for label in list(models)[:: 1 if number % 2 else -1]:
            timed = time_round(models[label], prompt, options.new_tokens)
            if number > 0:  # the first warms up: choice of kernels, the allocator's memory, caches
                found[label].append(timed)
            advance(1)
    return found


def time_round(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> Round:
    """Prefill a (batch, length) prompt, then decode `new_tokens` greedily with the cache that it left."""
    # transformers 5 renames the argument on the way: both names are in use.
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    kept: dict[str, Any] = {name: DynamicCache(config=model.config), "use_cache": True}
    start = _now(model.device)
    logits = model(input_ids=prompt, logits_to_keep=1, **kept).logits
    middle = _now(model.device)
    for _ in range(new_tokens):
        logits = model(input_ids=logits[:, -1:].argmax(-1), **kept).logits
    end = _now(model.device)
    return Round(prompt.numel() / (middle - start), len(prompt) * new_tokens / (end - middle))


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def check_lengths(checkpoints: Iterable[Checkpoint], options: SpeedOptions) -> None:
    """Raise UsageError where a prompt and its continuation exceed a model's positions."""
    longest = max(options.prompt_lengths) + options.new_tokens
    for checkpoint in checkpoints:
        limit = checkpoint.config.get("max_position_embeddings")
        if limit and longest > limit:
            raise UsageError(
                f"--speed-lengths and --speed-new-tokens come to {longest} tokens, {checkpoint.name} has {limit} "
                "positions: lower them"
            )


def _details(
    checkpoint: Checkpoint, model: PreTrainedModel, rounds: list[list[Round]], options: SpeedOptions, runtime: Runtime
) -> SpeedDetails:
    shape, vocabulary = checkpoint.shape, model.config.vocab_size
    cases = [
        SpeedCase(
            batch_size=batch,
            prompt_tokens=length,
            new_tokens=options.new_tokens,
            prefill=spread([r.prefill for r in found]),
            decode=spread([r.decode for r in found]),
            macs_prefill=macs_per_token(shape, (length + 1) / 2),
            macs_decode=macs_per_token(shape, length + (options.new_tokens + 1) / 2, vocabulary),
        )
        for (batch, length), found in zip(options.cases, rounds, strict=True)
    ]
    return SpeedDetails(
        device=str(runtime.device),
        dtype=dtype_name(runtime.dtype),
        threads=torch.get_num_threads(),
        rounds=options.rounds,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        odd_widths=odd_width_share(shape),
        cases=cases,
    )


def _speedup(rounds: dict[str, list[list[Round]]], details: dict[str, SpeedDetails], place: int) -> Speedup:
    """Gains of rounds that ran next to each other, and what the removed multiply-accumulates would allow."""
    pairs = list(zip(rounds["pruned"][place], rounds["dense"][place], strict=True))
    pruned, dense = details["pruned"].cases[place], details["dense"].cases[place]
    return Speedup(
        prefill=spread([p.prefill / d.prefill for p, d in pairs]),
        decode=spread([p.decode / d.decode for p, d in pairs]),
        prefill_possible=dense.macs_prefill / pruned.macs_prefill,
        decode_possible=dense.macs_decode / pruned.macs_decode,
    )


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))
