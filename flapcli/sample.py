"""Calibration text that the model writes itself, for where there is none: its own distribution, sampled plainly."""

import random

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flapcli.device import Batches
from flapcli.progress import Advance, Progress
from flapcli.ranks import Ranks

TOKENS_AT_ONCE = 8192  # as many as a batch holds at its end: 64 windows of 128


class Draw(LogitsProcessor):
    """Leaves only the token that each window's own random number picks: by the inverse of the cumulated softmax.

    The whole vocabulary at temperature 1, in float32, sums in float64 on the CPU. `numbers`: (batch, steps) in [0, 1).
    """

    def __init__(self, numbers: torch.Tensor, advance: Advance) -> None:
        self.numbers, self.advance = numbers, advance
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulated = torch.softmax(scores.cpu().float(), -1).double().cumsum(-1)
        aim = self.numbers[:, self.step, None] * cumulated[:, -1:]
        self.step += 1
        token = torch.searchsorted(cumulated, aim, right=True).clamp_(max=scores.shape[-1] - 1)
        self.advance(len(token))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, token.to(scores.device), 0.0)  # type: ignore[return-value]


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    batch_size: int | None,
    progress: Progress,
    ranks: Ranks | None = None,
) -> NDArray[np.int64]:
    """`nsamples` windows that `model` writes, (nsamples, seqlen), the same for the same seed on one machine.

    Each begins with the BOS token where the tokenizer puts one before a text, so that the model has learnt what may
    follow it; else with a token drawn uniformly, as LLM-QAT (arXiv 2305.17888) does always: a BOS that only chats
    begin with (SmolLM2's) gave worse text to calibrate on. An end of text is a token like others. Window i is drawn
    by numbers of its own, so how many there are, batches and `ranks`, who share the work, change it by no more than
    rounding does. Raises FlapError where memory does not suffice for a single window.
    """
    ranks = ranks or Ranks(0, 1, 0)
    first, numbers = _numbers(tokenizer, nsamples, seqlen, seed)
    size = max(1, TOKENS_AT_ONCE // seqlen)
    size = min(size, batch_size) if batch_size else size
    mine = ranks.share(-(-nsamples // size))  # whole batches, so that they are those of a single process
    start, stop = mine.start * size, min(mine.stop * size, nsamples)
    found = np.empty((max(stop - start, 0), seqlen), np.int64)
    model.generation_config = GenerationConfig()  # the checkpoint's own may cut the distribution or stop at an end

    batches = Batches(seqlen, model.device, None, progress)
    batches.size = size
    with torch.inference_mode(), progress.task("sample", found.size - len(found), "tokens") as advance:

        def step(part: slice) -> None:
            whole = slice(start + part.start, start + part.stop)
            found[part] = _continued(model, first[whole], Draw(numbers[whole], advance))
            ranks.check()

        batches.run(len(found), step, lambda _tokens: None)  # every step of a batch advances the bar
    parts = ranks.agree(found.tolist())
    return np.asarray([window for part in parts for window in part], np.int64)


def _continued(model: PreTrainedModel, first: torch.Tensor, draw: Draw) -> NDArray[np.int64]:
    """First tokens (batch, 1) and what is drawn to follow them, (batch, 1 + steps)."""
    ids = first.to(model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=draw.numbers.shape[1],
        logits_processor=LogitsProcessorList([draw]),
    )
    return out.cpu().numpy()


def _numbers(
    tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First tokens, (nsamples, 1), and the numbers in [0, 1) that decide the others, float64 (nsamples, seqlen - 1)."""
    draw = random.Random(seed)
    numbers = torch.tensor([[draw.random() for _ in range(seqlen)] for _ in range(nsamples)], dtype=torch.float64)
    if tokenizer.bos_token_id in tokenizer("").input_ids:
        return torch.full((nsamples, 1), tokenizer.bos_token_id), numbers[:, 1:]
    plain = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    return plain[(numbers[:, :1] * len(plain)).long()], numbers[:, 1:]
