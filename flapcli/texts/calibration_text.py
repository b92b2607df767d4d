"""Token windows that a dense model is run on: from texts, from the model itself, or from several of these."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flapcli.artifacts.self_text import SelfText, Window, load_selftext, save_selftext
from flapcli.artifacts.versions import versions
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.execution.device import Runtime
from flapcli.execution.loading import load_model
from flapcli.execution.ranks import Ranks, refuse_unlike
from flapcli.execution.settings import CalibrateOptions
from flapcli.progress import Progress
from flapcli.storage.dtypes import dtype_name
from flapcli.storage.resume import Resume, discard_all, key_of
from flapcli.texts.opening import opening
from flapcli.texts.sampling import Sampling, sample_windows
from flapcli.texts.windows import mixture_windows, windows_sha256


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
        resume = Resume(path, self._key(asked), ranks.rank, ranks.size)
        if force:
            resume.discard()
        windows = sample_windows(self.model, self.tokenizer, asked, progress, ranks, resume)
        if ranks.rank == 0:
            save_selftext(path, self._artifact(windows.tolist()))
            discard_all(path)
            progress.note(f"{path}: written")
        return windows

    def _key(self, asked: Sampling) -> str:
        """Of all that decides what is sampled, to the bit."""
        checkpoint, runtime = self.checkpoint, self.runtime
        facts = {
            "model": [checkpoint.name, checkpoint.fingerprint], "asked": asdict(asked), "versions": versions(),
            "tokenizer": checkpoint.tokenizer_sha256(chats=False), "dtype": dtype_name(runtime.dtype),
            "device": runtime.device.type,
        }  # fmt: skip
        return key_of(facts, b"")

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
    hint = "make files and versions of transformers alike, and give --dtype where auto stands for another"
    refuse_unlike(ranks, mine, hint)
