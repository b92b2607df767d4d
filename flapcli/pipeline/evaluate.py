"""`flap eval`: figures of a checkpoint and of its dense model, or those that are there already."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.card import renew_card
from flapcli.checkpoint import Checkpoint, Hub, open_checkpoint
from flapcli.corpus import NAMED, check_source, source_sha256
from flapcli.errors import FlapError, UsageError, only_with
from flapcli.evaluate.report import EvalReport, Measurement, Speedup, load_report, save_report
from flapcli.evaluate.suite import check_names, task_files_sha256, task_manager
from flapcli.mixture import SELF, Mixture
from flapcli.pipeline.common import Compute, default_text, versions
from flapcli.progress import Progress

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager

    from flapcli.evaluate.speed import SpeedOptions


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed: every batch size with every prompt length. None as threads: torch's own choice."""

    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (128,)
    new_tokens: int = 16
    rounds: int = 5
    threads: int | None = None


@dataclass(frozen=True)
class EvalOptions:
    """What is measured; recorded and compared by the cache. None as dtype: float32 on a CPU."""

    perplexity: tuple[str, ...] = ()
    seqlen: int = 128
    dtype: str = "auto"
    baseline: bool = True
    text_column: str = "text"
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    speed: SpeedSettings | None = None

    def check(self) -> None:
        """Raise UsageError for what no model could be measured by, and for options that do nothing."""
        if self.seqlen < 2:
            raise UsageError("--seqlen must be at least 2")
        for text in self.perplexity:
            check_source(text, "--perplexity")
        own = ("limit", "num_fewshot", "include_path")
        given = {f"--{name.replace('_', '-')}": getattr(self, name) is not None for name in own}
        only_with("--tasks", bool(self.tasks), given)


def run_eval(
    out: Path,
    checkpoint_name: str,
    model: str | None,
    hub: Hub,
    options: EvalOptions,
    compute: Compute,
    force: bool,
    progress: Progress,
    cache_requests: bool = False,
) -> tuple[EvalReport, bool]:
    """Stage 4: figures of a checkpoint, and of the dense one that it was pruned from.

    A report in which tasks failed is never up to date, so the next call tries them again.
    """
    options.check()
    if compute.stream and (options.tasks or options.speed):
        raise UsageError("--stream: tasks and speed need the whole model in memory; leave out --stream")
    found = _existing_report(out)
    manager = _checked_tasks(options, found)
    checkpoint = open_measured(checkpoint_name, hub)
    made_by = made_by_of(checkpoint)
    texts = list(options.perplexity) or [_default_perplexity(checkpoint, made_by, progress)]
    dense = dense_of(made_by, model, hub) if options.baseline else None
    settings = json.loads(json.dumps(asdict(options))) | {
        "perplexity": texts,
        "task_files": task_files_sha256(Path(options.include_path)) if options.include_path else None,
        "texts": {text: source_sha256(text) for text in texts},
        "fingerprint": checkpoint.fingerprint,
        "baseline": dense.fingerprint if dense else None,
        "names": [[which.name, which.hub.revision] for which in (checkpoint, dense) if which],
        "device": compute.device,
    }
    if found and not force and found.settings == settings and not found.all_failures:
        return found, True
    tasks = _Tasks(options, manager, cache_requests, rewrite=force) if options.tasks else None
    report = _measure(checkpoint, dense, texts, options, compute, settings, progress, tasks)
    save_report(out, report)
    if made_by and Path(checkpoint_name).exists():  # and not a copy in the hub's cache
        try:
            renew_card(checkpoint.path, checkpoint.config, report)
        except FlapError as error:
            progress.note(f"the model card keeps its old figures: {error}")
    return report, False


@dataclass(frozen=True)
class _Tasks:
    """Tasks to load once the models are known to be there."""

    options: EvalOptions
    manager: "TaskManager | None"
    cache_requests: bool
    rewrite: bool

    def load(self, progress: Progress) -> Any:
        from flapcli.evaluate.tasks import TaskOptions, load_tasks

        folder = Path(self.options.include_path) if self.options.include_path else None
        loaded = load_tasks(self.options.tasks, self.manager or task_manager(self.options.tasks, folder), progress)
        how = TaskOptions(self.options.limit, self.options.num_fewshot, self.cache_requests, self.rewrite, folder)
        return loaded, how


def _checked_tasks(options: EvalOptions, found: EvalReport | None) -> "TaskManager | None":
    """lm-eval's index, once it knows every task's name; None where the report shows that it does."""
    if not options.tasks or (found and found.settings.get("tasks") == list(options.tasks)):
        return None
    manager = task_manager(options.tasks, Path(options.include_path) if options.include_path else None)
    check_names(options.tasks, manager)
    return manager


def _measure(
    checkpoint: Checkpoint,
    dense: Checkpoint | None,
    texts: list[str],
    options: EvalOptions,
    compute: Compute,
    settings: dict[str, Any],
    progress: Progress,
    tasks: _Tasks | None,
) -> EvalReport:
    import torch

    from flapcli.device import pick_device, pick_eval_dtype
    from flapcli.evaluate.measure import measure_model
    from flapcli.evaluate.speed import check_lengths

    device = pick_device(compute.device)
    dtype = pick_eval_dtype(options.dtype, device)
    if compute.threads:
        torch.set_num_threads(compute.threads)
    if options.speed:
        check_lengths([checkpoint, dense] if dense else [checkpoint], _speed_options(options.speed))
    loaded = tasks.load(progress) if tasks else None
    measured = {
        label: measure_model(
            which,
            texts,
            options.seqlen,
            options.text_column,
            device,
            dtype,
            compute.batch_size,
            progress,
            label,
            loaded,
            compute.stream,
        )
        for label, which in (("pruned" if dense else "model", checkpoint), ("dense", dense))
        if which is not None
    }
    baseline = measured.pop("dense", None)
    [pruned] = measured.values()
    speedup = _time(checkpoint, dense, pruned, baseline, options.speed, device, dtype, progress)
    return EvalReport(**pruned.model_dump(), baseline=baseline, speedup=speedup, settings=settings, versions=versions())


def _time(
    checkpoint: Checkpoint,
    dense: Checkpoint | None,
    pruned: Measurement,
    baseline: Measurement | None,
    asked: SpeedSettings | None,
    device: "torch.device",
    dtype: "torch.dtype",
    progress: Progress,
) -> list[Speedup]:
    """Add speed and memory to both measurements; returns the pruned model's gains."""
    if asked is None:
        return []
    from flapcli.device import dtype_name
    from flapcli.evaluate.memory import peak_memory
    from flapcli.evaluate.speed import DENSE, PRUNED, measure_speed

    options = _speed_options(asked)
    checkpoints = {PRUNED: checkpoint} | ({DENSE: dense} if dense else {})
    details, speedup = measure_speed(checkpoints, options, device, dtype, progress)
    for label, measurement in ((PRUNED, pruned), (DENSE, baseline)):
        if measurement is None:
            continue
        first = details[label].cases[0]
        measurement.speed_details = details[label]
        measurement.speed = {
            "prefill_tokens_per_second": first.prefill.median,
            "decode_tokens_per_second": first.decode.median,
            "peak_memory_bytes": peak_memory(checkpoints[label], options, str(device), dtype_name(dtype)),
        }
    return speedup


def _speed_options(asked: SpeedSettings) -> "SpeedOptions":
    from flapcli.evaluate.speed import SpeedOptions

    return SpeedOptions(asked.batch_sizes, asked.prompt_lengths, asked.new_tokens, asked.rounds)


def _default_perplexity(checkpoint: Checkpoint, made_by: dict[str, Any], progress: Progress) -> str:
    """The text that the checkpoint was calibrated on, its test part where it has one."""
    default = default_text(made_by.get("model", {}).get("name", checkpoint.name))
    return calibration_text(made_by.get("dataset") or default, default, progress)


def calibration_text(dataset: str, default: str, progress: Progress) -> str:
    """Of the calibration's texts the first there is, to read perplexity on; warns where it is the very same text.

    Never text that the model wrote itself: that is what it can predict best, and no measure.
    """
    sources = [s for s in Mixture.read(dataset).sources if s != SELF] or [default]
    text = next((source for source in sources if source in NAMED or Path(source).is_file()), sources[0])
    try:
        check_source(text, "the calibration text")
    except UsageError as error:
        raise FlapError(f"{error}; give a text by --perplexity") from error
    if Path(text).is_file():
        progress.note(f"reading perplexity on {text}, the very text of the calibration: it flatters the pruned model; "
                      "give another one by --perplexity")  # fmt: skip
    return text


def open_measured(name: str, hub: Hub) -> Checkpoint:
    """The checkpoint to measure; --revision and --cache-dir are its own on the hub, a folder's dense model's."""
    return open_checkpoint(name, Hub(trust_remote_code=hub.trust_remote_code) if Path(name).exists() else hub)


def made_by_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a pruned folder records of its making; empty for any other checkpoint."""
    return (checkpoint.config.get("flap") or {}).get("made_by", {}) if checkpoint.path.is_dir() else {}


def dense_of(made_by: dict[str, Any], model: str | None, hub: Hub) -> Checkpoint | None:
    """The checkpoint that a pruned folder was made from. Raises FlapError where it is another by now."""
    if not made_by and not model:
        return None
    recorded = made_by.get("model", {})
    hub = Hub(hub.revision or recorded.get("revision"), hub.cache_dir, hub.trust_remote_code)
    try:
        dense = open_checkpoint(model or recorded["name"], hub)
    except FlapError as error:
        raise FlapError(
            f"the dense model can't be opened ({error}): give --model, or leave it out by --no-baseline"
        ) from error
    if recorded and dense.fingerprint != recorded["fingerprint"]:
        raise FlapError(
            f"{dense.name} ({dense.fingerprint[:12]}) is not the model that was pruned "
            f"({recorded['name']}, {recorded['fingerprint'][:12]}): give --model or --no-baseline"
        )
    return dense


def _existing_report(out: Path) -> EvalReport | None:
    if not out.exists():
        return None
    try:
        return load_report(out)
    except FlapError as error:
        try:
            if str(json.loads(out.read_bytes()).get("format", "")).startswith("flap-eval"):
                return None
        except (ValueError, AttributeError, OSError):
            pass
        raise FlapError(f"{out} exists and is not flap's: move it away or give another --out") from error
