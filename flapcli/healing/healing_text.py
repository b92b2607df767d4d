"""The windows of a healing: held-out ones for validation, then those trained on, in the order of training."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flapcli.execution.ranks import Ranks
from flapcli.execution.settings import HealOptions
from flapcli.progress import Progress
from flapcli.texts.calibration_text import CalibrationText
from flapcli.texts.mixture import SELF, Mixture
from flapcli.texts.windows import mixture_windows

LEAST, MOST, SHARE = 8, 64, 20  # windows for validation: one for so many that are trained on, within these


@dataclass(frozen=True)
class HealingText:
    """`windows` (n, seqlen), of which the first `held_out` are for validation."""

    windows: NDArray[np.int64]
    held_out: int


def steps_of(tokens: int, options: HealOptions) -> int:
    """The optimiser's steps that read at least so many tokens."""
    return -(-tokens // (options.step_windows * options.seqlen))


def healing_text(
    text: CalibrationText, steps: int, options: HealOptions, force: bool, progress: Progress, ranks: Ranks
) -> HealingText:
    """The same windows on every rank. Raises FlapError where a text can't be had or is too short.

    A file's end is held out, and the first of the windows that the dense model writes; what is trained on comes in an
    order drawn by the seed, so that every step sees every source.
    """
    trained = steps * options.step_windows
    held_out = min(max(trained // SHARE, LEAST), MOST)
    mixture = Mixture.read(str(text.options.dataset))
    own = np.empty((0, options.seqlen), np.int64)
    if SELF in mixture.sources:
        place = mixture.sources.index(SELF)
        count = sum(mixture.counts(windows)[place] for windows in (held_out, trained))
        own = text.own(count, force, progress, ranks)
    parts = [
        mixture_windows(replace(text.options, nsamples=count), text.tokenizer, take, is_held_out)
        for count, take, is_held_out in (
            (held_out, lambda first: own[:first], True),
            (trained, lambda last: own[len(own) - last :], False),
        )
    ]
    parts[1] = parts[1][np.random.default_rng(options.seed).permutation(trained)]
    windows = np.concatenate(parts)
    text.checkpoint.refuse_ids(windows)
    return HealingText(windows, held_out)
