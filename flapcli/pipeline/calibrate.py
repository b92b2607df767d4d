"""`flap calibrate`: statistics of a model, or those that are there already."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.checkpoint import Checkpoint, Hub, open_checkpoint
from flapcli.checkpoint.write import parse_size
from flapcli.errors import FlapError, UsageError
from flapcli.mixture import Mixture
from flapcli.pipeline.common import CalibrateOptions, Compute, Scale, several_processes
from flapcli.progress import Progress
from flapcli.safetensors_io import read_header
from flapcli.stats import StatsHeader, load_header

if TYPE_CHECKING:
    from flapcli.ranks import Ranks


def run_calibrate(
    out: Path,
    model: str,
    hub: Hub,
    options: CalibrateOptions,
    compute: Compute,
    force: bool,
    progress: Progress,
    scale: Scale | None = None,
) -> tuple[StatsHeader, bool]:
    """Stage 1: the statistics of MODEL in `out`, which rank 0 writes where torchrun started several."""
    scale = scale or Scale()
    mixture = Mixture.read(options.dataset)
    mixture.check()
    if min(options.nsamples, options.seqlen - 1) < 1:
        raise UsageError("--nsamples must be at least 1 and --seqlen at least 2")
    mixture.counts(options.nsamples)  # refuses shares of nothing before anything is opened
    parse_size(scale.activation_memory, "--activation-memory")
    if scale.stream and scale.device_map:
        raise UsageError("--stream uses one device: leave out --device-map")
    if not several_processes():
        return _calibrate(out, model, hub, options, compute, force, progress, scale, None)
    from flapcli.ranks import Ranks

    with Ranks.from_environment(scale.rank_timeout) as ranks:
        return _calibrate(out, model, hub, options, compute, force, progress, scale, ranks)


def _calibrate(
    out: Path,
    model: str,
    hub: Hub,
    options: CalibrateOptions,
    compute: Compute,
    force: bool,
    progress: Progress,
    scale: Scale,
    ranks: "Ranks | None",
) -> tuple[StatsHeader, bool]:
    checkpoint = open_checkpoint(model, hub)
    asked = asdict(options)
    text = Mixture.read(options.dataset).sha256()
    found = _existing_stats(out)
    current = found if found and not force and _same_calibration(found, checkpoint, asked, text) else None
    if ranks:  # all do as rank 0, whose file it is
        answer = ranks.agree(current and current.model_dump(mode="json"))[0]
        current = answer and StatsHeader.model_validate(answer)
    if current:
        return current, True
    from flapcli.pipeline.measuring import write_stats

    return write_stats(out, checkpoint, options, text, compute, force, progress, scale, ranks), False


def _existing_stats(out: Path) -> StatsHeader | None:
    """The header of stats at `out`, None where nothing or a broken one is there; refuses foreign files."""
    if not out.exists():
        return None
    try:
        return load_header(out)
    except FlapError as error:
        try:
            ours = out.is_file() and "flap" in read_header(out).metadata
        except FlapError:
            ours = out.name == "stats.safetensors"
        if not ours:
            raise FlapError(f"{out} exists and is not a flap stats file; move it away or give another --out") from error
        return None


def _same_calibration(found: StatsHeader, checkpoint: Checkpoint, asked: dict[str, Any], text: str | None) -> bool:
    """Whether stats answer what is asked; a resolved dtype, Gram matrices and Fisher information on top are as good."""
    recorded = {"gram_dtype": "float32", "fisher": False} | found.settings
    if asked["dtype"] == found.calibration.dtype:
        recorded["dtype"] = asked["dtype"]
    if not asked["gram"]:
        recorded |= {"gram": False, "gram_dtype": asked["gram_dtype"]}
    if not asked["fisher"]:
        recorded["fisher"] = False
    model, revision = found.model, checkpoint.hub.revision
    same_model = (model.fingerprint, model.name, model.revision) == (checkpoint.fingerprint, checkpoint.name, revision)
    return same_model and recorded == asked and found.calibration.source_sha256 == text
