"""Text that a model writes itself: windows drawn from its own distribution (METHOD.md, Own text)."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, generation

from flapcli.checkpoints.tensor_file import load_tensors, save_tensors
from flapcli.execution.batches import Batches
from flapcli.execution.device import float64_device
from flapcli.execution.head import cached_rows, drawn
from flapcli.execution.memory import free_memory
from flapcli.execution.ranks import Ranks
from flapcli.progress import Advance, Progress
from flapcli.storage.resume import Pauses, Resume
from flapcli.texts.opening import opening, room_for_text

CPU_TOKENS, GPU_TOKENS, OF_FREE = 8192, 131072, 4  # a batch's tokens at its end, whose cache takes a quarter at most
DRAWN = "windows.safetensors"


class Draw(generation.LogitsProcessor):
    """Leaves only the token that each window's own random number picks: by the inverse of the cumulated softmax.

    The whole vocabulary at temperature 1, in float32, sums in float64, for which the CPU serves a device that has none.
    `numbers`: (batch, steps) in [0, 1).
    """

    def __init__(self, numbers: torch.Tensor, advance: Advance) -> None:
        self.numbers, self.advance = numbers, advance
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        likely = torch.softmax(scores.to(float64_device(scores.device)).float(), -1)
        numbers = self.numbers[:, self.step]
        parts = (drawn(likely[rows].double(), numbers[rows]) for rows in cached_rows(likely))
        tokens = torch.cat(list(parts))
        self.step += 1
        self.advance(len(tokens))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, tokens[:, None].to(scores.device), 0.0)  # type: ignore[return-value]


@dataclass(frozen=True)
class Sampling:
    """How much text, by which seed; `batch_size` None: as many windows at once as `tokens_at_once` make."""

    nsamples: int
    seqlen: int
    seed: int = 0
    batch_size: int | None = None


def tokens_at_once(model: PreTrainedModel) -> int:
    """A batch's tokens at its end: a step of few windows takes a GPU as long as one of many."""
    if model.device.type == "cpu":
        return CPU_TOKENS
    config = model.config.get_text_config()
    cached = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize  # bytes of a token, at the most
    return max(CPU_TOKENS, min(GPU_TOKENS, free_memory(model.device) // OF_FREE // cached))


class Drawn:
    """`windows` (n, seqlen) of one process, of which `done` are there; saved now and then where it may go on."""

    def __init__(self, count: int, seqlen: int, resume: Resume | None) -> None:
        self.windows, self.done = np.empty((count, seqlen), np.int64), 0
        self._resume, self._pauses = resume, Pauses()
        if resume and resume.found and (path := resume.folder / DRAWN).exists():
            found = load_tensors(path)[0]["windows"].numpy()
            self.done = len(found)
            self.windows[: self.done] = found

    def take(self, part: slice, ids: torch.Tensor) -> None:
        self.windows[part], self.done = ids.cpu().numpy(), part.stop
        if self._resume and self._pauses.is_due:
            with self._pauses.saving():
                whole = {"windows": torch.from_numpy(self.windows[: self.done])}
                save_tensors(self._resume.ready() / DRAWN, whole, {})


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sampling,
    progress: Progress,
    ranks: Ranks | None = None,
    resume: Resume | None = None,
) -> NDArray[np.int64]:
    """`nsamples` windows that `model` writes (METHOD.md, Own text), (nsamples, seqlen).

    The same for the same seed on one machine. Window i is drawn by numbers of its own, so how many there are, batches
    and `ranks`, who share the work, change it by no more than rounding does. Raises FlapError where memory does not
    suffice for a single window, UsageError where windows are too short for any text. What a killed run saved in
    `resume` is gone on with.
    """
    ranks = ranks or Ranks.alone()
    nsamples, seqlen = asked.nsamples, asked.seqlen
    first, numbers = _numbers(tokenizer, nsamples, seqlen, asked.seed)
    steps = numbers.shape[1]
    batches = Batches(seqlen, model.device, None, progress)
    most = tokens_at_once(model)
    batches.size = size = max(1, min(most // seqlen, asked.batch_size or most))
    mine = ranks.share(-(-nsamples // size))  # whole batches, so that they are those of a single process
    start, stop = mine.start * size, min(mine.stop * size, nsamples)
    found = Drawn(max(stop - start, 0), seqlen, resume)
    model.generation_config = generation.GenerationConfig()  # the checkpoint's may cut the distribution or stop early
    with torch.inference_mode(), progress.task("sample", len(found.windows) * steps, "tokens") as advance:
        advance(found.done * steps)

        def step(part: slice) -> None:
            whole = slice(start + part.start, start + part.stop)
            ids, draw = first[whole].to(model.device), Draw(numbers[whole], advance)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps,
                logits_processor=generation.LogitsProcessorList([draw]),
            )  # fmt: skip
            found.take(part, out)
            ranks.check()

        batches.run(len(found.windows), step, done=found.done)  # every step of a batch advances the bar
    parts = ranks.agree(found.windows.tolist())
    return np.asarray([window for part in parts for window in part], np.int64)


def _numbers(
    tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First tokens, (nsamples, n), and the numbers in [0, 1) that decide the others, float64 (nsamples, seqlen - n)."""
    draw, first = random.Random(seed), opening(tokenizer)
    room_for_text(first, seqlen)
    numbers = torch.tensor([[draw.random() for _ in range(seqlen)] for _ in range(nsamples)], dtype=torch.float64)
    if first:
        return torch.tensor([first] * nsamples), numbers[:, len(first) :]
    plain = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    return plain[(numbers[:, :1] * len(plain)).long()], numbers[:, 1:]
