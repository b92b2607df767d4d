"""How many tokens `--minutes` hold: a little of every kind of work is timed before any is done."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from flapcli.execution.batches import Batches
from flapcli.execution.head import parts_of
from flapcli.healing.healing_text import HealingText
from flapcli.healing.work import Work
from flapcli.progress import Silent
from flapcli.storage.atomic import atomic_file
from flapcli.texts.mixture import SELF, Mixture
from flapcli.texts.opening import opening
from flapcli.texts.sampling import Sampling, sample_windows, tokens_at_once

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
    request = work.request
    options, draw = request.options, np.random.default_rng(0)
    shape = (options.step_windows, options.seqlen)
    text = HealingText(draw.integers(0, request.dense.vocabulary, shape), 0)
    before = _writing(work) + (_saying(work, text) if request.keeps_teacher else 0.0)
    return before + VALIDATION * _learning(replace(work, progress=Silent()), text)


def _writing(work: Work) -> float:
    """Seconds per token of the text, of which the dense model writes its share."""
    options, mixture = work.request.options, Mixture.read(str(work.request.options.dataset))
    if SELF not in mixture.sources:
        return 0.0
    share = mixture.weights[mixture.sources.index(SELF)] / sum(mixture.weights)
    windows = max(1, tokens_at_once(work.dense) // options.seqlen)
    asked = Sampling(windows, len(opening(work.text.tokenizer)) + SAMPLED, batch_size=windows)
    return share * _timed(lambda: sample_windows(work.dense, work.text.tokenizer, asked, Silent()).size)


def _saying(work: Work, text: HealingText) -> float:
    """Seconds per token that the dense model takes to say what follows."""
    request, teacher = work.request, work.online_teacher(work.request.options.top_k)
    device, seqlen = teacher.forward.device, request.options.seqlen
    batches = Batches(seqlen, device, request.execution.batch_size, Silent())

    def say(part: slice) -> None:
        targets = teacher.targets(part, torch.from_numpy(text.windows[part]))
        for rows in parts_of((part.stop - part.start) * (seqlen - work.start)):
            targets.rows(rows)

    def say_all() -> int:
        batches.run(len(text.windows), say)
        return text.windows.size

    return _timed(say_all)


def _learning(work: Work, text: HealingText) -> float:
    """Seconds per token of the optimiser's steps, the dense model beside the student where it is asked as it goes."""
    options, teacher = work.request.options, None
    if options.online and work.request.teaches:
        teacher = work.online_teacher(None)
    else:
        work.forget_dense()
    trainer = work.trainer(teacher, text, 2, options.loss if teacher else "ce")
    optimiser = torch.optim.AdamW(trainer.objective.student.trained.values())

    def learn() -> int:
        trainer.step(optimiser, 0)
        return text.windows.size

    return _timed(learn)


def _timed(work: Callable[[], int]) -> float:
    """Seconds per token of work that returns how many tokens it was on, done once before to warm up."""
    work()
    start = time.monotonic()
    tokens = work()
    return (time.monotonic() - start) / tokens
