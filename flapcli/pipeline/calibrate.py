"""`flap calibrate`: statistics of a model, or those that are there already."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flapcli.checkpoint import Checkpoint, Hub, open_checkpoint
from flapcli.corpus import check_source, source_sha256
from flapcli.errors import FlapError, UsageError
from flapcli.pipeline.common import Compute, versions
from flapcli.progress import Progress
from flapcli.safetensors_io import read_header
from flapcli.stats import Calibration, StatsHeader, has_gram, load_header, save_stats


@dataclass(frozen=True)
class CalibrateOptions:
    """What decides the statistics; recorded and compared by the cache."""

    dataset: str
    nsamples: int = 1024
    seqlen: int = 128
    seed: int = 0
    dtype: str = "auto"
    gram: bool = False
    text_column: str = "text"


def run_calibrate(
    out: Path,
    model: str,
    hub: Hub,
    options: CalibrateOptions,
    compute: Compute,
    force: bool,
    progress: Progress,
) -> tuple[StatsHeader, bool]:
    """Stage 1: the statistics of MODEL in `out`."""
    check_source(options.dataset, "--dataset")
    if min(options.nsamples, options.seqlen - 1) < 1:
        raise UsageError("--nsamples must be at least 1 and --seqlen at least 2")
    checkpoint = open_checkpoint(model, hub)
    asked = asdict(options)
    text = source_sha256(options.dataset)
    found = _existing_stats(out)
    if found and not force and _same_calibration(found, out, checkpoint, asked, text):
        return found, True
    from flapcli.calibrate import measure
    from flapcli.corpus import calibration_windows
    from flapcli.device import dtype_name, pick_device, pick_dtype
    from flapcli.loading import quiet_transformers

    quiet_transformers()
    device = pick_device(compute.device)
    dtype = pick_dtype(options.dtype, device)
    shape = checkpoint.shape
    windows = calibration_windows(
        options.dataset,
        checkpoint.load_tokenizer(),
        options.nsamples,
        options.seqlen,
        options.seed,
        options.text_column,
    )
    measured = measure(checkpoint, windows, device, dtype, compute.batch_size, options.gram, progress)
    calibration = Calibration(
        **{key: value for key, value in asked.items() if key not in ("dtype", "gram")},
        tokens=int(windows.size),
        dtype=dtype_name(dtype),
        source_sha256=text,
    )
    header = StatsHeader(model=shape, calibration=calibration, settings=asked, versions=versions())
    save_stats(out, header, measured.modules, measured.grams)
    return header, False


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


def _same_calibration(
    found: StatsHeader, out: Path, checkpoint: Checkpoint, asked: dict[str, Any], text: str | None
) -> bool:
    """Whether stats answer what is asked; a resolved dtype and Gram matrices on top are as good."""
    recorded = dict(found.settings)
    if asked["dtype"] == found.calibration.dtype:
        recorded["dtype"] = asked["dtype"]
    if not asked["gram"] or has_gram(out):
        recorded["gram"] = asked["gram"]
    same_model = found.model.fingerprint == checkpoint.fingerprint and found.model.name == checkpoint.name
    return same_model and recorded == asked and found.calibration.source_sha256 == text
