"""Token windows that a dense model is run on: from texts, from the model itself, or from several of these."""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, generation

from flapcli.artifacts.self_text import SelfText, Window, load_selftext, save_selftext
from flapcli.artifacts.versions import versions
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.execution.batches import Batches
from flapcli.execution.device import Runtime
from flapcli.execution.loading import load_model
from flapcli.execution.ranks import Ranks
from flapcli.execution.settings import CalibrateOptions
from flapcli.progress import Advance, Progress
from flapcli.storage.dtypes import dtype_name
from flapcli.texts.opening import opening, room_for_text
from flapcli.texts.windows import mixture_windows, windows_sha256

TOKENS_AT_ONCE = 8192  # as many as a batch holds at its end: 64 windows of 128


class Draw(generation.LogitsProcessor):
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


@dataclass(frozen=True)
class Sampling:
    """How much text, by which seed; `batch_size` None: as many windows at once as 8,192 tokens make."""

    nsamples: int
    seqlen: int
    seed: int = 0
    batch_size: int | None = None


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sampling,
    progress: Progress,
    ranks: Ranks | None = None,
) -> NDArray[np.int64]:
    """`nsamples` windows that `model` writes (METHOD.md, Own text), (nsamples, seqlen).

    The same for the same seed on one machine. Window i is drawn by numbers of its own, so how many there are, batches
    and `ranks`, who share the work, change it by no more than rounding does. Raises FlapError where memory does not
    suffice for a single window, UsageError where windows are too short for any text.
    """
    ranks = ranks or Ranks.alone()
    nsamples, seqlen = asked.nsamples, asked.seqlen
    first, numbers = _numbers(tokenizer, nsamples, seqlen, asked.seed)
    steps = numbers.shape[1]
    batches = Batches(seqlen, model.device, None, progress)
    batches.size = size = max(1, min(TOKENS_AT_ONCE // seqlen, asked.batch_size or TOKENS_AT_ONCE))
    mine = ranks.share(-(-nsamples // size))  # whole batches, so that they are those of a single process
    start, stop = mine.start * size, min(mine.stop * size, nsamples)
    found = np.empty((max(stop - start, 0), seqlen), np.int64)
    model.generation_config = generation.GenerationConfig()  # the checkpoint's may cut the distribution or stop early
    with torch.inference_mode(), progress.task("sample", len(found) * steps, "tokens") as advance:

        def step(part: slice) -> None:
            whole = slice(start + part.start, start + part.stop)
            ids, draw = first[whole].to(model.device), Draw(numbers[whole], advance)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps,
                logits_processor=generation.LogitsProcessorList([draw]),
            )  # fmt: skip
            found[part] = out.cpu().numpy()
            ranks.check()

        batches.run(len(found), step)  # every step of a batch advances the bar
    parts = ranks.agree(found.tolist())
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


@dataclass
class CalibrationText:
    """The text of one calibration, or of one healing; what the model writes itself is kept at `place`.

    After `windows` or `own`, `model` is the model in memory where it had to be loaded, so that nobody loads it again.
    """

    place: Path
    checkpoint: Checkpoint
    options: CalibrateOptions
    runtime: Runtime
    device_map: str | None = None
    streamed: bool = False
    model: PreTrainedModel | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.checkpoint.load_tokenizer()

    def windows(self, force: bool, progress: Progress, ranks: Ranks) -> NDArray[np.int64]:
        """All ranks' windows, (nsamples, seqlen), one source after the other in the order named.

        The order changes no statistics beyond rounding; this way a source's part is one slice, and the same windows
        as that source alone gives. Raises FlapError where a text can't be had.
        """
        windows = mixture_windows(self.options, self.tokenizer, lambda count: self.own(count, force, progress, ranks))
        self.checkpoint.refuse_ids(windows)
        return windows

    def own(self, count: int, force: bool, progress: Progress, ranks: Ranks) -> NDArray[np.int64]:
        """The model's own text: what an earlier run sampled, else sampled now by all ranks and written by rank 0."""
        path, options, runtime = self.place, self.options, self.runtime
        known = self._known(path, count, force) if ranks.rank == 0 else None
        if found := ranks.agree(known)[0]:
            progress.note(f"{path}: up to date")
            return np.asarray(found, np.int64)
        if self.streamed:
            raise FlapError(
                f"--dataset self: sampling needs the whole model in memory, and this calibration goes layer by layer: "
                f"calibrate the same ({count} windows of {options.seqlen}, seed {options.seed}) where it fits, with "
                f"--no-stream, and copy the self.json that this writes to {path}; or give a text"
            )
        if self.model is None:
            progress.doing(f"loading {self.checkpoint.name}")
            self.model = load_model(self.checkpoint, runtime.dtype, runtime.device, self.device_map)
        asked = Sampling(count, options.seqlen, options.seed, runtime.batch_size)
        windows = sample_windows(self.model, self.tokenizer, asked, progress, ranks)
        if ranks.rank == 0:
            save_selftext(path, self._artifact(windows.tolist()))
            progress.note(f"{path}: written")
        return windows

    def _known(self, path: Path, count: int, force: bool) -> list[list[int]] | None:
        """Tokens of the text at `path` where it is what this would sample; where it can't, one sampled elsewhere is."""
        found, first = load_selftext(path), opening(self.tokenizer)
        if found is None or (force and not self.streamed):
            return None
        same = found.is_of(self.checkpoint.shape, count, self.options.seqlen, self.options.seed)
        same &= found.tokenizer_sha256 in (None, self.checkpoint.tokenizer_sha256(chats=False))
        same &= all(window.tokens[: len(first)] == first for window in found.windows)
        sampled_by = (found.model, found.dtype)
        ours = self.streamed or sampled_by == (self.checkpoint.name, dtype_name(self.runtime.dtype))
        return found.array.tolist() if same and ours else None

    def _artifact(self, tokens: list[list[int]]) -> SelfText:
        texts = self.tokenizer.batch_decode(tokens)
        return SelfText(
            model=self.checkpoint.name,
            revision=self.checkpoint.hub.revision,
            fingerprint=self.checkpoint.fingerprint,
            nsamples=len(tokens),
            seqlen=self.options.seqlen,
            seed=self.options.seed,
            dtype=dtype_name(self.runtime.dtype),
            tokenizer_sha256=self.checkpoint.tokenizer_sha256(chats=False),
            versions=versions(),
            windows=[Window(text=text, tokens=ids) for text, ids in zip(texts, tokens, strict=True)],
        )


def refuse_unlike_ranks(ranks: Ranks, checkpoint: Checkpoint, windows: NDArray[np.int64], dtype: torch.dtype) -> None:
    """Raise FlapError where ranks would add up sums of unlike things."""
    mine = {"model": checkpoint.fingerprint, "text": windows_sha256(windows), "--dtype": dtype_name(dtype)}
    first, *others = ranks.agree(mine)
    for rank, theirs in enumerate(others, 1):
        if unlike := [name for name in first if theirs[name] != first[name]]:
            raise FlapError(
                f"rank {rank} and rank 0 do not work on the same, they differ in: {', '.join(unlike)} (files, "
                "versions of transformers, or what --dtype auto stands for): make them alike, or give --dtype"
            )
