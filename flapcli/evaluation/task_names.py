"""Which tasks `zero-shot` stands for, which metric speaks for a task, and names checked. No torch."""

import difflib
import json
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.errors import UsageError
from flapcli.storage.hashing import files_below, files_sha256

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@cache
def _table() -> dict[str, Any]:
    """zero_shot.json: suites as {task: metric of the paper}, and metrics by preference for other tasks."""
    return json.loads(Path(__file__).with_name("zero_shot.json").read_bytes())


def expand(names: str) -> tuple[str, ...]:
    """`a,b,zero-shot` as task names, suites spelled out, none twice. Raises UsageError where none is given."""
    found: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        found |= dict.fromkeys(_table()["suites"].get(name, [name]))
    if not found:
        raise UsageError("--tasks: give lm-eval's task names, separated by commas, or zero-shot")
    return tuple(found)


def main_metric(task: str, metrics: dict[str, float]) -> str | None:
    """The metric that speaks for a task: the paper's for its seven, else the first of an accuracy's names.

    None where the task has no accuracy (perplexity tasks), so that no average mixes the two.
    """
    papers = {name: metric for suite in _table()["suites"].values() for name, metric in suite.items()}
    wanted = [papers[task]] if task in papers else _table()["main_metrics"]
    return next((metric for metric in wanted if metric in metrics), None)


def average(tasks: dict[str, dict[str, float]]) -> tuple[list[str], float | None]:
    """Tasks that have a main metric, and its mean over them, as the paper averages; None without any."""
    values = {task: values[metric] for task, values in tasks.items() if (metric := main_metric(task, values))}
    return list(values), sum(values.values()) / len(values) if values else None


def task_manager(names: tuple[str, ...], include_path: str | None) -> "TaskManager":
    """lm-eval's index of its own tasks and of those in `include_path`. Raises UsageError where that is no folder.

    Where all `names` are tasks of `include_path`, which go before lm-eval's own, the thousands of others are
    not read: that takes seconds. Groups may refer to any task.
    """
    folder = Path(include_path) if include_path else None
    if folder and not folder.is_dir():
        raise UsageError(f"--include-path {folder}: no such folder")
    return _task_manager(names, folder, task_files_sha256(folder) if folder else None)


@cache
def _task_manager(names: tuple[str, ...], folder: Path | None, _files: str | None) -> "TaskManager":
    """The index, read once for the checks before a run and for its evaluations; `_files` tells changed task files."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder:
        local = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(local.all_subtasks):
            return local
    return TaskManager(include_path=str(folder) if folder else None)


def check_names(names: tuple[str, ...], manager: "TaskManager") -> None:
    """Raise UsageError that lists every name that lm-eval does not know, with near ones."""
    known = manager.all_tasks
    wrong = []
    for name in (name for name in names if name not in known):
        near = difflib.get_close_matches(name, known, n=3)
        wrong.append(name + (f" (did you mean {', '.join(near)}?)" if near else ""))
    if wrong:
        raise UsageError(f"--tasks: lm-eval knows no {'; no '.join(wrong)}; own task files go by --include-path")


def task_files_sha256(folder: Path) -> str:
    """Hash of names and contents of all files below `folder`, as task files and their local data are."""
    return files_sha256(folder, files_below(folder).values())
