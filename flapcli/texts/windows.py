"""The token windows of a calibration, drawn from its texts, and drawn again later for a fit on the same text."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flapcli.artifacts.self_text import load_selftext, path_beside
from flapcli.artifacts.stats import Calibration, StatsHeader
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError, UsageError
from flapcli.execution.settings import CalibrateOptions
from flapcli.texts.corpus import calibration_windows
from flapcli.texts.mixture import SELF, Mixture
from flapcli.texts.opening import opening_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def mixture_windows(
    text: CalibrateOptions | Calibration,
    tokenizer: "PreTrainedTokenizerBase",
    own: Callable[[int], NDArray[np.int64]],
    held_out: bool | None = None,
) -> NDArray[np.int64]:
    """Windows (nsamples, seqlen) of what `text` names, its sources in order; `own` gives that many of `self`.

    `held_out` as in `calibration_windows`.
    """
    mixture = Mixture.read(str(text.dataset))
    counts = dict(zip(mixture.sources, mixture.counts(text.nsamples), strict=True))
    parts = {  # texts before sampling, which takes longer to fail
        source: calibration_windows(source, tokenizer, count, text.seqlen, text.seed, text.text_column, held_out)
        for source, count in counts.items()
        if source != SELF
    }
    if SELF in counts:
        parts[SELF] = own(counts[SELF])
    return np.concatenate([parts[source] for source in mixture.sources])


def windows_of_stats(stats: StatsHeader, path: Path, checkpoint: Checkpoint) -> NDArray[np.int64]:
    """The windows (nsamples, seqlen) that the statistics at `path` are of, drawn again from their text.

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

    tokenizer = checkpoint.load_tokenizer()
    if (begins_with := opening_text(tokenizer)) != text.begins_with:
        raise FlapError(
            f"the windows of {path} begin with {text.begins_with or 'text'}, those of {checkpoint.name} with "
            f"{begins_with or 'text'}: run `flap calibrate --force` and `flap plan` again"
        )
    windows = mixture_windows(text, tokenizer, own)
    checkpoint.refuse_ids(windows)
    if text.windows_sha256 not in (None, windows_sha256(windows)):
        raise another
    return windows


def windows_sha256(windows: NDArray[np.int64]) -> str:
    """Hash of token ids, by which statistics tell their text from another."""
    return hashlib.sha256(windows.tobytes()).hexdigest()
