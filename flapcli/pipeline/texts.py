"""The windows of a calibration: from texts, from the model itself, or from several of these."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint import Checkpoint
from flapcli.corpus import calibration_windows
from flapcli.device import dtype_name
from flapcli.errors import FlapError, UsageError
from flapcli.loading import load_model
from flapcli.mixture import SELF, Mixture
from flapcli.pipeline.common import CalibrateOptions, Compute, versions
from flapcli.progress import Progress
from flapcli.ranks import Ranks
from flapcli.sample import sample_windows
from flapcli.selftext import SelfText, Window, load_selftext, path_beside, save_selftext
from flapcli.stats import Calibration, StatsHeader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def drawn(
    text: CalibrateOptions | Calibration, tokenizer: "PreTrainedTokenizerBase", own: Callable[[int], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Windows (nsamples, seqlen) of what `text` names, its sources in order; `own` gives that many of `self`."""
    mixture = Mixture.read(text.dataset)
    counts = dict(zip(mixture.sources, mixture.counts(text.nsamples), strict=True))
    parts = {  # texts before sampling, which takes longer to fail
        source: calibration_windows(source, tokenizer, count, text.seqlen, text.seed, text.text_column)
        for source, count in counts.items()
        if source != SELF
    }
    if SELF in counts:
        parts[SELF] = own(counts[SELF])
    return np.concatenate([parts[source] for source in mixture.sources])


def redrawn(stats: StatsHeader, path: Path, checkpoint: Checkpoint) -> NDArray[np.int64]:
    """The windows (nsamples, seqlen) that the statistics at `path` are of, drawn once more.

    Raises FlapError where the text is not there any more, or another one by now.
    """
    text = stats.calibration
    mixture = Mixture.read(text.dataset)
    try:
        mixture.check()
    except UsageError as error:
        raise FlapError(f"the calibration text of {path} is needed once more: {error}") from error
    another = FlapError(
        f"the calibration text {text.dataset} is another one than {path} was made from: put that one back, or run "
        "`flap calibrate --force` and `flap plan` again"
    )
    if mixture.sha256() != text.source_sha256:
        raise another

    def own(count: int) -> NDArray[np.int64]:
        place = path_beside(path)
        found = load_selftext(place)
        if found is None or not found.is_of(stats.model, count, text.seqlen, text.seed):
            raise FlapError(
                f"{place} does not hold the text that {path} was made from: put it back, or run `flap calibrate "
                "--force` and `flap plan` again"
            )
        return found.array

    windows = drawn(text, checkpoint.load_tokenizer(), own)
    if text.windows_sha256 not in (None, windows_sha256(windows)):
        raise another
    return windows


def windows_sha256(windows: NDArray[np.int64]) -> str:
    return hashlib.sha256(windows.tobytes()).hexdigest()


class Texts:
    """The text of one calibration into `out`.

    After `windows`, `model` is the model in memory where it had to be loaded, so that nobody loads it again.
    """

    def __init__(
        self,
        out: Path,
        checkpoint: Checkpoint,
        options: CalibrateOptions,
        device: torch.device,
        dtype: torch.dtype,
        device_map: str | None,
        streamed: bool,
    ) -> None:
        self.path, self.checkpoint, self.options = path_beside(out), checkpoint, options
        self.device, self.dtype, self.device_map, self.streamed = device, dtype, device_map, streamed
        self.model: PreTrainedModel | None = None

    def windows(self, compute: Compute, force: bool, progress: Progress, ranks: Ranks) -> NDArray[np.int64]:
        """All ranks' windows, (nsamples, seqlen), one source after the other in the order named.

        The order changes no statistics beyond rounding; this way a source's part is one slice, and the same windows
        as that source alone gives. Raises FlapError where a text can't be had.
        """
        tokenizer = self.checkpoint.load_tokenizer()
        return drawn(
            self.options,
            tokenizer,
            lambda count: self._own(tokenizer, count, compute.batch_size, force, progress, ranks),
        )

    def _own(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        count: int,
        batch_size: int | None,
        force: bool,
        progress: Progress,
        ranks: Ranks,
    ) -> NDArray[np.int64]:
        """The model's own text: what an earlier run sampled, else sampled now by all ranks and written by rank 0."""
        known = self._known(count, force) if ranks.rank == 0 else None
        if found := ranks.agree(known)[0]:
            progress.note(f"{self.path}: up to date")
            return np.asarray(found, np.int64)
        options = self.options
        if self.streamed:
            raise FlapError(
                f"--dataset self: sampling needs the whole model in memory, and this calibration goes layer by layer: "
                f"calibrate the same ({count} windows of {options.seqlen}, seed {options.seed}) where it fits, with "
                f"--no-stream, and copy the self.json that this writes to {self.path}; or give a text"
            )
        self.model = load_model(self.checkpoint, self.dtype, self.device, self.device_map)
        windows = sample_windows(
            self.model, tokenizer, count, options.seqlen, options.seed, batch_size, progress, ranks
        )  # fmt: skip
        if ranks.rank == 0:
            self._save(tokenizer, windows)
            progress.note(f"{self.path}: written")
        return windows

    def _known(self, count: int, force: bool) -> list[list[int]] | None:
        """Tokens of the text at `path` where it is what this would sample; where it can't, one sampled elsewhere is."""
        found = load_selftext(self.path)
        if found is None or (force and not self.streamed):
            return None
        options = self.options
        same = found.is_of(self.checkpoint.shape, count, options.seqlen, options.seed)
        elsewhere = self.streamed or (found.model, found.dtype) == (self.checkpoint.name, dtype_name(self.dtype))
        return found.array.tolist() if same and elsewhere else None

    def _save(self, tokenizer: "PreTrainedTokenizerBase", windows: NDArray[np.int64]) -> None:
        tokens = windows.tolist()
        texts = tokenizer.batch_decode(tokens)
        made = SelfText(
            model=self.checkpoint.name,
            revision=self.checkpoint.hub.revision,
            fingerprint=self.checkpoint.fingerprint,
            nsamples=len(tokens),
            seqlen=self.options.seqlen,
            seed=self.options.seed,
            dtype=dtype_name(self.dtype),
            versions=versions(),
            windows=[Window(text=text, tokens=ids) for text, ids in zip(texts, tokens, strict=True)],
        )
        save_selftext(self.path, made)
