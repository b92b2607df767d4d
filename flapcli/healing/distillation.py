"""The part of `flap heal` that computes: text, teacher, training, and the folder that comes of it."""

from flapcli import __version__
from flapcli.architecture.flap_section import Healed
from flapcli.artifacts.versions import versions
from flapcli.errors import FlapError
from flapcli.execution.loading import quiet_transformers
from flapcli.execution.ranks import Ranks
from flapcli.healing.budget import tokens_within
from flapcli.healing.healed_folder import Source, write_healed
from flapcli.healing.healing_request import HealingRequest
from flapcli.healing.healing_text import HealingText, healing_text, steps_of
from flapcli.healing.teacher import Teacher
from flapcli.healing.teacher_cache import TeacherCache, found_teacher
from flapcli.healing.training_state import SavedTraining
from flapcli.healing.work import Work
from flapcli.progress import Progress, Silent
from flapcli.storage.atomic import atomic_folder, require_writable
from flapcli.storage.dtypes import dtype_name
from flapcli.storage.resume import discard_all, key_of
from flapcli.texts.calibration_text import refuse_unlike_ranks


def heal_folder(request: HealingRequest, keep_old: bool, force: bool, progress: Progress, ranks: Ranks) -> bool:
    """Train and write what is asked for, going on where a killed run of the same stopped; `force` begins anew.

    False where held-out windows were not read better for it: then nothing is written.
    """
    quiet_transformers()
    for checkpoint in (request.dense, request.checkpoint):
        checkpoint.refuse_length(request.options.seqlen)
    if request.keeps_teacher:
        found_teacher(request.teacher)  # refused here where it is not flap's, not after hours
    if ranks.rank == 0:
        require_writable(request.out)
    work = Work(request, ranks, Silent() if ranks.rank else progress, force)
    improved = _train(work, keep_old)
    ranks.agree(None)  # until rank 0 has written all, each may have to go on
    discard_all(request.out)
    return improved


def _train(work: Work, keep_old: bool) -> bool:
    request, progress = work.request, work.progress
    steps = steps_of(request.options.tokens or tokens_within(work), request.options)
    progress.doing(f"reading {request.options.dataset}")
    text = healing_text(work.text, steps, request.options, work.force, progress, work.ranks)
    refuse_unlike_ranks(work.ranks, request.dense, text.windows, work.runtime.dtype)
    teacher = _teacher(work, text) if request.teaches else None
    if request.keeps_teacher or not request.teaches:
        work.forget_dense()
    progress.doing(f"loading {request.checkpoint.name}")
    trainer = work.trainer(teacher, text, steps, request.options.loss)
    student = trainer.objective.student
    state = trainer.train(SavedTraining(work.resume, student.trained, work.ranks.rank == 0))
    progress.doing("reading held-out windows")
    state.put_best(student.trained)
    student.settle()
    best, before, after = state.curve[state.best_point], state.curve[0].validation, trainer.validate()
    if not after < before:
        progress.note(
            f"{request.out} is not written: on held-out windows the loss did not fall below that of "
            f"{request.folder.path} ({before:.4f} before, {after:.4f} at best); lower --lr, or give other text"
        )
        return False
    progress.note(f"loss on held-out windows {before:.4f} -> {after:.4f}, after {best.tokens:,} tokens")
    healed = Healed(
        version=__version__, input_sha256=request.input_sha256, settings=request.settings,
        text_sha256=request.text_sha256, tokens=state.curve[-1].tokens, best=best.tokens, before=before, after=after,
        curve=state.curve,
    )  # fmt: skip
    if work.ranks.rank == 0:
        with atomic_folder(request.out, keep_old) as scratch:
            write_healed(scratch, Source(request.folder, request.checkpoint), student, healed, progress)
    return True


def _teacher(work: Work, text: HealingText) -> Teacher:
    """The dense model in memory, or what it said of all windows, on disk; rank 0 writes that where it is not there."""
    request, options = work.request, work.request.options
    if options.online:
        return work.online_teacher(None)
    k = min(options.top_k, request.dense.vocabulary)
    facts = {"dense": request.dense.fingerprint, "name": request.dense.name, "dtype": dtype_name(work.runtime.dtype),
             "k": k, "layers": request.dense_layers, "start": work.start, "versions": versions()}  # fmt: skip
    cache = TeacherCache(
        request.teacher, key_of(facts, text.windows.tobytes()), text.windows, work.start, k, request.dense_layers,
        request.dense.shape.hidden_size, work.runtime.device,
    )  # fmt: skip
    if work.ranks.rank == 0 and (work.force or cache.find() is None):
        work.progress.note(
            f"the dense model's {k} likeliest tokens at {text.windows.size:,} places take {cache.nbytes / 1e9:.2f} GB: "
            f"{cache.path} (--online keeps nothing)"
        )
        cache.write(work.online_teacher(k), request.execution.batch_size, work.progress)
    work.ranks.agree(None)
    if (found := cache.find()) is None:
        raise FlapError(f"{cache.path}, which rank 0 wrote, is not here: keep it on a shared volume, or give --online")
    return found
