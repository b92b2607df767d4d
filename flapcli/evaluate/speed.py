"""Speed of the dense and the pruned model: alternating rounds in one process, medians and spread."""

import gc
import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from flapcli.checkpoint.base import Checkpoint
from flapcli.device import dtype_name
from flapcli.errors import UsageError
from flapcli.evaluate.cost import macs_per_token, odd_width_share
from flapcli.evaluate.report import SpeedCase, SpeedDetails, Speedup, Spread
from flapcli.loading import load_model
from flapcli.memory import give_back
from flapcli.progress import Advance, Progress

PRUNED, DENSE = "pruned", "dense"


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed: every batch size with every prompt length, `rounds` times after one that does not count."""

    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (128,)
    new_tokens: int = 16
    rounds: int = 5

    @property
    def cases(self) -> list[tuple[int, int]]:
        return [(batch, length) for batch in self.batch_sizes for length in self.prompt_lengths]


@dataclass(frozen=True)
class Round:
    """Tokens per second of one round, over all sequences of the batch."""

    prefill: float
    decode: float


def measure_speed(
    checkpoints: dict[str, Checkpoint],
    options: SpeedOptions,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[dict[str, SpeedDetails], list[Speedup]]:
    """Time every model of {PRUNED: ..., DENSE: ...} (or one alone) in turns, all of them in memory at once.

    Turns even out what else the machine does: each round runs the models one after the other on the same
    tokens, in an order that changes every round. Returns each model's figures, and case by case the pruned
    model's gain.
    """
    models = {label: load_model(checkpoint, dtype, device) for label, checkpoint in checkpoints.items()}
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
        label: _details(checkpoints[label], model, rounds[label], options, device, dtype)
        for label, model in models.items()
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
    cache = DynamicCache(config=model.config)
    kept: dict[str, Any] = {_cache_argument(type(model)): cache, "use_cache": True}
    start = _now(model.device)
    logits = model(input_ids=prompt, logits_to_keep=1, **kept).logits
    middle = _now(model.device)
    for _ in range(new_tokens):
        logits = model(input_ids=logits[:, -1:].argmax(-1), **kept).logits
    end = _now(model.device)
    return Round(prompt.numel() / (middle - start), len(prompt) * new_tokens / (end - middle))


def _cache_argument(model: type[PreTrainedModel]) -> str:
    """transformers 5 renames it on the way: both names are in use."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def check_lengths(checkpoints: list[Checkpoint], options: SpeedOptions) -> None:
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
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    rounds: list[list[Round]],
    options: SpeedOptions,
    device: torch.device,
    dtype: torch.dtype,
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
        device=str(device),
        dtype=dtype_name(dtype),
        threads=torch.get_num_threads(),
        rounds=options.rounds,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        odd_widths=odd_width_share(shape),
        cases=cases,
    )


def _speedup(rounds: dict[str, list[list[Round]]], details: dict[str, SpeedDetails], place: int) -> Speedup:
    """Gains of rounds that ran next to each other, and what the removed multiply-accumulates would allow."""
    pairs = list(zip(rounds[PRUNED][place], rounds[DENSE][place], strict=True))
    pruned, dense = details[PRUNED].cases[place], details[DENSE].cases[place]
    return Speedup(
        prefill=spread([p.prefill / d.prefill for p, d in pairs]),
        decode=spread([p.decode / d.decode for p, d in pairs]),
        prefill_possible=dense.macs_prefill / pruned.macs_prefill,
        decode_possible=dense.macs_decode / pruned.macs_decode,
    )


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))
