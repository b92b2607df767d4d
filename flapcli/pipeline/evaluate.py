"""`flap eval`: figures of a checkpoint and of its dense model, or those that are there already."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flapcli.checkpoint import Checkpoint, Hub, open_checkpoint
from flapcli.corpus import check_source, source_sha256
from flapcli.errors import FlapError, UsageError
from flapcli.evaluate.report import EvalReport, load_report, save_report
from flapcli.pipeline.common import Compute, default_text, versions
from flapcli.progress import Progress


@dataclass(frozen=True)
class EvalOptions:
    """What is measured; recorded and compared by the cache. None as dtype: float32 on a CPU."""

    perplexity: tuple[str, ...] = ()
    seqlen: int = 128
    dtype: str = "auto"
    baseline: bool = True
    text_column: str = "text"


def run_eval(
    out: Path,
    checkpoint_name: str,
    model: str | None,
    hub: Hub,
    options: EvalOptions,
    compute: Compute,
    force: bool,
    progress: Progress,
) -> tuple[EvalReport, bool]:
    """Stage 4: figures of a checkpoint, and of the dense one that it was pruned from."""
    if options.seqlen < 2:
        raise UsageError("--seqlen must be at least 2")
    for text in options.perplexity:
        check_source(text, "--perplexity")
    checkpoint = open_checkpoint(checkpoint_name, Hub(trust_remote_code=hub.trust_remote_code))
    made_by = (checkpoint.config.get("flap") or {}).get("made_by", {}) if checkpoint.path.is_dir() else {}
    texts = list(options.perplexity) or [_default_perplexity(checkpoint, made_by, progress)]
    dense = _dense_of(made_by, model, hub) if options.baseline else None
    settings = asdict(options) | {
        "perplexity": texts,
        "texts": {text: source_sha256(text) for text in texts},
        "fingerprint": checkpoint.fingerprint,
        "baseline": dense.fingerprint if dense else None,
    }
    found = _existing_report(out)
    if found and not force and found.settings == settings:
        return found, True
    report = _measure(checkpoint, dense, texts, options, compute, settings, progress)
    save_report(out, report)
    return report, False


def _measure(
    checkpoint: Checkpoint,
    dense: Checkpoint | None,
    texts: list[str],
    options: EvalOptions,
    compute: Compute,
    settings: dict[str, Any],
    progress: Progress,
) -> EvalReport:
    import torch

    from flapcli.device import pick_device, pick_dtype
    from flapcli.evaluate.measure import measure_model

    device = pick_device(compute.device)
    on_cpu = options.dtype == "auto" and device.type == "cpu"
    dtype = torch.float32 if on_cpu else pick_dtype(options.dtype, device)
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
        )
        for label, which in (("pruned" if dense else "model", checkpoint), ("dense", dense))
        if which is not None
    }
    baseline = measured.pop("dense", None)
    [pruned] = measured.values()
    return EvalReport(**pruned.model_dump(), baseline=baseline, settings=settings, versions=versions())


def _default_perplexity(checkpoint: Checkpoint, made_by: dict[str, Any], progress: Progress) -> str:
    """The text that the checkpoint was calibrated on, its test part where it has one."""
    text = made_by.get("dataset") or default_text(made_by.get("model", {}).get("name", checkpoint.name))
    check_source(text, "the calibration text")
    if Path(text).is_file():
        progress.note(f"reading perplexity on {text}, the very text of the calibration: it flatters the pruned model; "
                      "give another one by --perplexity")  # fmt: skip
    return text


def _dense_of(made_by: dict[str, Any], model: str | None, hub: Hub) -> Checkpoint | None:
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
