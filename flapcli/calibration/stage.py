"""Stage 1, `flap calibrate`: statistics of a model, or those that are there already. Imports torch only to compute."""

from dataclasses import replace
from pathlib import Path

from flapcli.artifacts.run_dir import hold
from flapcli.artifacts.stats import STATS, StatsHeader
from flapcli.calibration.request import CalibrationRequest
from flapcli.checkpoints import DEMO, Hub, open_checkpoint
from flapcli.errors import UsageError
from flapcli.execution.processes import is_writer, several_ranks
from flapcli.execution.settings import CalibrateOptions, Execution
from flapcli.progress import IMPORTING, Progress, Silent
from flapcli.storage.sizes import parse_size
from flapcli.texts.corpus import default_text
from flapcli.texts.mixture import Mixture

MAX_TOKENS = 2**30  # 8.6 GB of ids

__all__ = ["CalibrateOptions", "calibrate"]


def calibrate(
    model: str = DEMO,
    out: Path = Path("flap-run/stats.safetensors"),
    options: CalibrateOptions = CalibrateOptions(),
    hub: Hub = Hub(),
    execution: Execution = Execution(),
    force: bool = False,
    progress: Progress = Silent(),
) -> tuple[StatsHeader, bool]:
    """The statistics of MODEL in `out`, and whether they were there already.

    Rank 0 writes where torchrun started several. Raises UsageError for options that don't go together, FlapError where
    model or text can't be had.
    """
    if options.dataset is None:
        options = replace(options, dataset=default_text(model))
    mixture = Mixture.read(str(options.dataset))
    _check(options, execution, mixture)
    options = replace(options, dataset=mixture.absolute().name)
    with several_ranks(execution.rank_timeout) as ranks, hold(out, ranks.rank if ranks else 0):
        progress.doing(f"opening {model}")
        checkpoint = open_checkpoint(model, hub)
        checkpoint.attention_unit = options.attention_unit
        checkpoint.prefers_query_heads = options.prefers_query_heads
        request = CalibrationRequest(out, checkpoint, options, execution)
        request.text_sha256  # noqa: B018  a text that can't be read is told before what lies at `out` is looked at
        current = STATS.current(out, request.answered_by, force)
        if ranks:  # all do as rank 0, whose file it is
            answer = ranks.agree(current and current.model_dump(mode="json"))[0]
            current = answer and StatsHeader.model_validate(answer)
        if current:
            return current, True
        if out.exists() and not force and is_writer():
            progress.note(f"{out} is of other settings, and is replaced once this is done; another -d would keep it")
        progress.doing(IMPORTING)
        from flapcli.calibration.job import write_stats
        from flapcli.execution.ranks import Ranks

        return write_stats(request, force, progress, ranks or Ranks.alone()), False


def _check(options: CalibrateOptions, execution: Execution, mixture: Mixture) -> None:
    """Raise UsageError for misuse, before anything is opened."""
    mixture.check()
    if min(options.nsamples, options.seqlen - 1) < 1:
        raise UsageError("--nsamples must be at least 1 and --seqlen at least 2")
    if (tokens := options.nsamples * options.seqlen) > MAX_TOKENS:
        raise UsageError(f"--nsamples {options.nsamples}: {tokens:,} tokens are more than memory is asked to hold")
    mixture.counts(options.nsamples)  # refuses shares of nothing
    parse_size(execution.activation_memory, "--activation-memory")
    if execution.stream and execution.device_map:
        raise UsageError("--stream uses one device: leave out --device-map")
