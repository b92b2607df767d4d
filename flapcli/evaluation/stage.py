"""Stage 4, `flap eval`: figures of a checkpoint and of its dense model, or those that are there already.

Imports torch only to compute.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.artifacts.dense_model import dense_of
from flapcli.artifacts.eval_report import EVAL, EvalReport, Measurement, Size, Speedup, save_report
from flapcli.artifacts.model_card import renew_card
from flapcli.artifacts.pruned_folder import PrunedFolder
from flapcli.artifacts.run_dir import holding
from flapcli.artifacts.unfinished import save_measured, told
from flapcli.artifacts.versions import versions
from flapcli.checkpoints import Checkpoint, Hub, open_checkpoint
from flapcli.errors import FlapError, UsageError
from flapcli.evaluation.task_names import check_names, task_files_sha256, task_manager
from flapcli.execution.settings import EvalOptions, Execution, SpeedOptions
from flapcli.progress import IMPORTING, Progress, Silent
from flapcli.storage.atomic import require_writable
from flapcli.texts.corpus import NAMED, check_source, default_text, may_hold_chats, source_sha256
from flapcli.texts.mixture import SELF, Mixture
from flapcli.texts.opening import opens_as

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from flapcli.execution.device import Runtime

__all__ = ["EvalOptions", "SpeedOptions", "evaluate"]


@holding
def evaluate(
    checkpoint_name: str | Path,
    out: Path,
    options: EvalOptions = EvalOptions(),
    model: str | None = None,
    hub: Hub = Hub(),
    execution: Execution = Execution(),
    force: bool = False,
    progress: Progress = Silent(),
) -> tuple[EvalReport, bool]:
    """Figures of a checkpoint, and of the dense one that it was pruned from (`model`, if it lies elsewhere by now).

    And whether they were there; a report in which tasks failed or parts are missing is never up to date, so the next
    call tries these again. Raises UsageError for options that don't go together, FlapError where model, text or a
    task's data can't be had, UnfinishedError (with the report) where a later part fails, or the report can't be saved.
    """
    check_options(options, execution)
    progress.doing(f"opening {checkpoint_name}")
    found = EVAL.find(out)
    manager = known_tasks(options, found)
    checkpoint = open_measured(checkpoint_name, hub)
    options = replace(options, perplexity=options.perplexity or (_default_perplexity(checkpoint, progress),))
    dense = dense_of(checkpoint.made_by, model, hub) if options.baseline else None
    models = {"pruned": checkpoint, "dense": dense} if dense else {"model": checkpoint}
    if options.divergence:
        _check_comparable(checkpoint, dense)
    settings = _settings(options, models, execution.device)
    same = found is not None and not force and _tokenizers_of(settings) | found.settings == settings
    begun = found if found and same and _opens_as_measured(models, found) else None
    if begun and begun.is_whole:
        _renew_card(checkpoint, checkpoint_name, begun, progress)  # which a full disk or a kill may have prevented
        return begun, True
    for each in models.values():
        each.refuse_length(options.seqlen)
    require_writable(out)
    measured, failure = _begin(models, begun), None
    speedup = begun.speedup if begun else []
    try:
        speedup = _measure(out, models, measured, options, execution, manager, force, progress) or speedup
    except (Exception, KeyboardInterrupt) as error:
        if not any(each.perplexity for each in measured.values()):
            raise
        failure = error
    first, baseline = measured[next(iter(models))], measured.get("dense")
    report = EvalReport(
        **first.model_dump(), baseline=baseline if baseline and baseline.perplexity else None, speedup=speedup,
        unfinished=told(failure) if failure else None, settings=settings, versions=versions(),
    )  # fmt: skip
    save_measured(save_report, out, report, failure, found is not None and found.is_whole)
    _renew_card(checkpoint, checkpoint_name, report, progress)
    return report, False


def _renew_card(checkpoint: Checkpoint, name: str | Path, report: EvalReport, progress: Progress) -> None:
    """Put the figures into the card of a pruned folder, unless it is a copy in the hub's cache."""
    if checkpoint.flap and Path(name).exists():
        try:
            renew_card(PrunedFolder(checkpoint.path, checkpoint.config_in_files, checkpoint.flap), report)
        except FlapError as error:
            progress.note(f"the model card keeps its old figures: {error}")


def _begin(models: dict[str, Checkpoint], begun: EvalReport | None) -> dict[str, Measurement]:
    """What is known of each model before anything is measured: its size, and what was `begun` of the same request."""
    known = dict(zip(models, (begun, begun.baseline) if begun else (), strict=False))
    fields = set(Measurement.model_fields)
    return {
        label: Measurement(**there.model_dump(include=fields))
        if (there := known.get(label))
        else Measurement(
            checkpoint=str(each.path),
            perplexity={},
            size=Size(parameters=each.shape.parameters, bytes=each.nbytes, stored_as=each.stored_as),
        )
        for label, each in models.items()
    }


def check_options(options: EvalOptions, execution: Execution) -> None:
    """Raise UsageError for what no model could be measured by, and for options that don't go together."""
    options.check()
    for text in options.perplexity:
        check_source(text, "--perplexity")
    if execution.stream and (options.tasks or options.speed):
        raise UsageError("--stream: tasks and speed need the whole model in memory; leave out --stream")


def _check_comparable(checkpoint: Checkpoint, dense: Checkpoint | None) -> None:
    """Raise FlapError where there is no dense model that the predictions of `checkpoint` could be held against."""
    if dense is None:
        raise FlapError(
            f"--divergence: {checkpoint.name} does not say of which model it was made: name the dense one by --model"
        )
    if (ours := checkpoint.vocabulary) != (theirs := dense.vocabulary):
        raise FlapError(
            f"--divergence: {checkpoint.name} predicts {ours:,} tokens and {dense.name} {theirs:,}: leave it out"
        )


def _settings(options: EvalOptions, models: dict[str, Checkpoint], device: str) -> dict[str, Any]:
    """All that decides the figures, as eval.json keeps it."""
    fingerprints = [checkpoint.fingerprint for checkpoint in models.values()]
    chats = any(map(may_hold_chats, options.perplexity))
    return json.loads(json.dumps(options.recorded())) | {
        "task_files": task_files_sha256(Path(options.include_path)) if options.include_path else None,
        "texts": {text: source_sha256(text) for text in options.perplexity},
        "fingerprint": fingerprints[0],
        "baseline": fingerprints[1] if len(models) > 1 else None,
        "names": [[checkpoint.name, checkpoint.hub.revision] for checkpoint in models.values()],
        "device": device,
        "tokenizers": [checkpoint.tokenizer_sha256(chats) for checkpoint in models.values()],
    }


def _tokenizers_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What a report that does not say its tokenizers, of an older version, is taken to be of."""
    return {"tokenizers": settings["tokenizers"]}


def _opens_as_measured(models: dict[str, Checkpoint], found: EvalReport) -> bool:
    """Whether each model's windows begin as those that `found` was measured on."""
    for checkpoint, there in zip(models.values(), (found, found.baseline), strict=False):
        details = [there.perplexity_details.get(text) for text in there.perplexity] if there else []
        if not opens_as(checkpoint, *(text.begins_with if text else None for text in details)):
            return False
    return True


def known_tasks(options: EvalOptions, found: EvalReport | None) -> "TaskManager | None":
    """lm-eval's index, once it knows every task's name; None where the report shows that it does.

    Raises UsageError for names that it does not know.
    """
    if not options.tasks or (found and found.settings.get("tasks") == list(options.tasks)):
        return None
    manager = task_manager(options.tasks, options.include_path)
    check_names(options.tasks, manager)
    return manager


def check_tasks(options: EvalOptions, found: EvalReport | None, progress: Progress) -> None:
    """Raise as `known_tasks`, and FlapError where the data of a task can't be had: before anything is computed."""
    if manager := known_tasks(options, found):
        from flapcli.evaluation.tasks import Tasks

        Tasks(options, manager).load(progress)


def _measure(
    out: Path,
    models: dict[str, Checkpoint],
    measured: dict[str, Measurement],
    options: EvalOptions,
    execution: Execution,
    manager: "TaskManager | None",
    rewrite_cache: bool,
    progress: Progress,
) -> list[Speedup]:
    """Put into `measured` what each model's figures lack; returns the pruned one's gains in speed."""
    progress.doing(IMPORTING)
    from flapcli.evaluation.measure import Measuring
    from flapcli.evaluation.reference import References
    from flapcli.evaluation.speed import check_lengths
    from flapcli.execution.device import Runtime

    runtime = replace(Runtime.of_eval(execution, options.dtype), scratch=out)
    if options.speed:
        check_lengths(models.values(), options.speed)
    tasks = None
    if options.tasks:
        from flapcli.evaluation.tasks import Tasks

        manager = manager or task_manager(options.tasks, options.include_path)
        tasks = Tasks(options, manager, execution.cache_requests, rewrite_cache).load(progress)
    lacking = {
        label: [text for text in options.perplexity if text not in each.perplexity] for label, each in measured.items()
    }
    labels = list(models)
    if options.divergence:  # the dense model goes first, and is read again where the pruned one was cut short
        labels.reverse()
        lacking["dense"] = list(dict.fromkeys([*lacking["dense"], *lacking["pruned"]]))
    with References(runtime) as references:
        measuring = Measuring(
            options, tasks, execution.stream, runtime, progress, references if options.divergence else None
        )
        for label in labels:
            measuring.measure(measured[label], models[label], label, lacking[label])
    if not options.speed or all(each.speed for each in measured.values()):
        return []
    return _add_speed(measured, models, options.speed, runtime, progress)


def _add_speed(
    measured: dict[str, Measurement],
    models: dict[str, Checkpoint],
    options: SpeedOptions,
    runtime: "Runtime",
    progress: Progress,
) -> list[Speedup]:
    """Add speed and memory to every model's measurement; returns the pruned model's gains."""
    from flapcli.evaluation.peak_memory import peak_memory
    from flapcli.evaluation.speed import measure_speed

    details, speedup = measure_speed(models, options, runtime, progress)
    for label, measurement in measured.items():
        first = details[label].cases[0]
        measurement.speed_details = details[label]
        progress.doing(f"memory of the {label} model")
        measurement.speed = {
            "prefill_tokens_per_second": first.prefill.median,
            "decode_tokens_per_second": first.decode.median,
            "peak_memory_bytes": peak_memory(models[label], options, runtime),
        }
    return speedup


def _default_perplexity(checkpoint: Checkpoint, progress: Progress) -> str:
    """The text that the checkpoint was calibrated on, its test part where it has one."""
    made_by = checkpoint.made_by
    default = default_text(made_by.model.name if made_by else checkpoint.name)
    dataset = (made_by and made_by.dataset) or default
    digest = made_by.dataset_sha256 if made_by else None
    return calibration_text(dataset, digest, default, progress)


def calibration_text(dataset: str, digest: str | None, default: str, progress: Progress) -> str:
    """Of the calibration's texts, with their hash, the first there is, to read perplexity on; says where it is a file.

    Never text that the model wrote itself: that is what it can predict best, and no measure.
    """
    sources = [s for s in Mixture.read(dataset).sources if s != SELF] or [default]
    text = next((source for source in sources if source in NAMED or Path(source).is_file()), sources[0])
    try:
        check_source(text, "the calibration text")
    except UsageError as error:
        raise FlapError(f"{error}; give a text by --perplexity") from error
    if Path(text).is_file():
        progress.note(
            f"reading perplexity on {text}, the very text of the calibration: it flatters the pruned model; "
            "give another one by --perplexity"
            if digest is None or _sha256(dataset) == digest
            else f"reading perplexity on {text}, which is not what it was at the calibration"
        )
    return text


def _sha256(dataset: str) -> str | None:
    """Hash of a calibration's texts as they are now; None where one of them is gone."""
    try:
        return Mixture.read(dataset).sha256()
    except FlapError:
        return None


def open_measured(name: str | Path, hub: Hub) -> Checkpoint:
    """The checkpoint to measure; --revision and --cache-dir are its own on the hub, a folder's dense model's."""
    return open_checkpoint(name, Hub(trust_remote_code=hub.trust_remote_code) if Path(name).exists() else hub)
