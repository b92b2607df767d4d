"""How many tokens `--minutes` hold: a little of every kind of work is timed before any is done."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from flapcli.execution.batches import Batches
from flapcli.healing.healing_text import HealingText
from flapcli.healing.work import Work
from flapcli.progress import Silent
from flapcli.storage.atomic import atomic_file
from flapcli.texts.calibration_text import TOKENS_AT_ONCE, Sampling, sample_windows
from flapcli.texts.mixture import SELF, Mixture
from flapcli.texts.opening import opening

SAMPLED = 16  # tokens of each window that are sampled to see how long it takes
VALIDATION = 1.15  # what reading held-out windows as it goes adds to training


def tokens_within(work: Work) -> int:
    """At least a step's; what an earlier run found where this one goes on from it, so that it goes on to the same."""
    path = work.resume.folder / "tokens"
    if work.resume.found and path.exists():
        return int(path.read_text())
    work.ranks.agree(None)
    options = work.request.options
    work.progress.doing("timing a few steps")
    seconds = max(work.ranks.agree(_seconds_per_token(work)))
    steps = max(1, int((options.minutes or 0) * 60 / seconds) // (options.step_windows * options.seqlen))
    tokens = steps * options.step_windows * options.seqlen
    work.progress.note(f"{options.minutes:g} minutes hold about {tokens:,} tokens here")
    if work.ranks.rank == 0:
        with atomic_file(work.resume.ready() / path.name) as scratch:
            scratch.write_text(str(tokens))
    return tokens


def _seconds_per_token(work: Work) -> float:
    """Of all that a token takes: to be written by the dense model where it writes its own text, said, and learnt."""
    request, quiet = work.request, replace(work, progress=Silent())
    options, draw = request.options, np.random.default_rng(0)
    shape = (options.step_windows, options.seqlen)
    text = HealingText(draw.integers(0, request.dense.vocabulary, shape), 0)
    mixture, found = Mixture.read(str(options.dataset)), 0.0
    if SELF in mixture.sources:
        share = mixture.weights[mixture.sources.index(SELF)] / sum(mixture.weights)
        windows = max(1, TOKENS_AT_ONCE // options.seqlen)
        length = len(opening(work.text.tokenizer)) + SAMPLED
        asked = Sampling(windows, length, batch_size=windows)
        found += share * _timed(lambda: sample_windows(work.dense, work.text.tokenizer, asked, Silent()).size)
    if request.teaches and not options.online:
        teacher = work.online_teacher(options.top_k)

        def say(part: slice) -> None:
            targets = teacher.targets(part, torch.from_numpy(text.windows[part]))
            targets.rows(slice(None))

        batches = Batches(options.seqlen, teacher.forward.device, request.execution.batch_size, Silent())

        def say_all() -> int:
            batches.run(options.step_windows, say)
            return text.windows.size

        found += _timed(say_all)
    beside = work.online_teacher(None) if options.online and request.teaches else None
    if beside is None:
        work.forget_dense()
    trainer = quiet.trainer(beside, text, 2, options.loss if beside else "ce")
    optimiser = torch.optim.AdamW(trainer.objective.student.trained.values())
    return found + VALIDATION * _timed(lambda: int(trainer.step(optimiser, 0) < np.inf) * text.windows.size)


def _timed(work: Callable[[], int]) -> float:
    """Seconds per token of work that returns how many tokens it was on, done once before to warm up."""
    work()
    start = time.monotonic()
    tokens = work()
    return (time.monotonic() - start) / tokens
