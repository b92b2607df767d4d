"""What an artifact or a run folder holds, for `flap show`. No torch."""

import json
from pathlib import Path
from typing import Any

from flapcli.errors import FlapError
from flapcli.evaluate.report import load_report
from flapcli.plan import load_plan
from flapcli.rundir import RunDir
from flapcli.selftext import FORMAT as SELF_FORMAT
from flapcli.selftext import load_selftext
from flapcli.stats import load_header
from flapcli.sweep import FORMAT as SWEEP_FORMAT
from flapcli.sweep import load_sweep

# Name of the artifact, its data, and the console function that draws it with its arguments.
Found = tuple[str, Any, tuple[Any, ...]]


def inspect(path: Path) -> list[Found]:
    """Everything found at `path`. Raises FlapError where nothing of flap's is there."""
    if not path.exists():
        raise FlapError(f"nothing at {path}: give a run folder, stats, plan, checkpoint or eval.json")
    if path.is_file():
        return [_file(path)]
    if (path / "config.json").exists():
        return [_checkpoint(path)]
    run = RunDir(path)
    found = [_file(part) for part in (run.stats, run.plan) if part.exists()]
    if run.pruned.exists():
        found.append(_checkpoint(run.pruned))
    found += [_file(part) for part in (run.eval, run.sweep) if part.exists()]
    if not found:
        raise FlapError(f"{path} holds no artifact of flap: `flap run` makes them")
    return found


def _file(path: Path) -> Found:
    if path.suffix == ".safetensors":
        header = load_header(path)
        return "stats", header.model_dump(), ("show_stats", header)
    if path.suffix in (".yaml", ".yml"):
        plan = load_plan(path)
        return "plan", plan.model_dump(exclude_none=True), ("show_plan", plan)
    if path.suffix == ".json":
        with path.open(encoding="utf-8", errors="replace") as file:
            start = file.read(100)
        if SWEEP_FORMAT in start:
            sweep = load_sweep(path)
            return "sweep", sweep.model_dump(), ("show_sweep", sweep)
        if SELF_FORMAT in start and (written := load_selftext(path)):
            return "self", written.model_dump(), ("show_selftext", written)
        report = load_report(path)
        return "eval", report.model_dump(), ("show_report", report)
    raise FlapError(f"{path}: flap writes .safetensors, .yaml and .json files and checkpoint folders")


def _checkpoint(path: Path) -> Found:
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise FlapError(f"{path / 'config.json'} can't be read: {error}") from error
    if "made_by" not in (config.get("flap") or {}):
        raise FlapError(f"{path} is a checkpoint that flap did not write (model_type {config.get('model_type')})")
    return "checkpoint", config, ("show_folder", config, str(path))
