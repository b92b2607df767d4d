"""How every artifact is shown, as JSON and as a table, and what a path holds of them. No torch."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flapcli.artifacts import self_text, sweep_results
from flapcli.artifacts.eval_report import EvalReport, load_report
from flapcli.artifacts.plan import Plan, load_plan
from flapcli.artifacts.pruned_folder import PrunedFolder, load_pruned
from flapcli.artifacts.run_dir import RunDir
from flapcli.artifacts.stats import StatsHeader, load_header
from flapcli.errors import FlapError
from flapcli.export.stage import ExportedGguf
from flapcli.views import tables


class View(NamedTuple):
    """An artifact's name, what JSON has of it, and what draws it."""

    name: str
    data: Callable[[Any], Any]
    draw: Callable[[Any], None]


VIEWS: dict[type, View] = {
    StatsHeader: View("stats", StatsHeader.model_dump, tables.show_stats),
    Plan: View("plan", partial(Plan.model_dump, exclude_none=True), tables.show_plan),
    PrunedFolder: View("checkpoint", PrunedFolder.as_json, tables.show_folder),
    EvalReport: View("eval", EvalReport.model_dump, tables.show_report),
    sweep_results.Sweep: View("sweep", sweep_results.Sweep.model_dump, tables.show_sweep),
    self_text.SelfText: View("self", self_text.SelfText.model_dump, tables.show_selftext),
    ExportedGguf: View("export", ExportedGguf.as_json, tables.show_export),
}


def data_of(artifacts: Iterable[Any]) -> dict[str, Any]:
    """What JSON has of artifacts, by their names."""
    return {_name(made): VIEWS[type(made)].data(made) for made in artifacts}


def _name(made: Any) -> str:
    is_healed = isinstance(made, PrunedFolder) and made.flap.healed
    return "healed" if is_healed else VIEWS[type(made)].name


def inspect(path: Path) -> list[Any]:
    """Every artifact found at `path`. Raises FlapError where nothing of flap's is there."""
    if not path.exists():
        raise FlapError(f"nothing at {path}: give a run folder, stats, plan, checkpoint or eval.json")
    if path.is_file():
        return [_in_file(path)]
    if (path / "config.json").exists():
        return [load_pruned(path)]
    run = RunDir(path)
    loads = {run.stats: _in_file, run.plan: _in_file, run.pruned: load_pruned, run.healed: load_pruned}
    loads |= {run.eval: _in_file, run.sweep: _in_file}
    found = [load(part) for part, load in loads.items() if part.exists()]
    if not found:
        raise FlapError(f"{path} holds no artifact of flap: `flap run` makes them")
    return found


def _in_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_header(path)
    if path.suffix in (".yaml", ".yml"):
        return load_plan(path)
    if path.suffix != ".json":
        raise FlapError(f"{path}: flap writes .safetensors, .yaml and .json files and checkpoint folders")
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(100)
    if sweep_results.FORMAT in start:
        return sweep_results.load_sweep(path)
    return (self_text.load_selftext(path) if self_text.FORMAT in start else None) or load_report(path)
