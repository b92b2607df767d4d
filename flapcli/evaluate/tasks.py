"""lm-eval's tasks on a model in memory, through its Python interface."""

import functools
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import lm_eval.api.task
from lm_eval import evaluator
from lm_eval.caching import cache
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flapcli.errors import FlapError, first_line
from flapcli.evaluate.suite import task_files_sha256
from flapcli.progress import Advance, Progress

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

CPU_BATCH = 8  # requests; on a GPU lm-eval finds the largest that fits


@dataclass
class LoadedTasks:
    """Tasks with their data, by the names asked for, and why others can't be run."""

    manager: "TaskManager"
    objects: dict[str, Any]
    failures: dict[str, str]


@dataclass
class TaskResults:
    """Every task's metrics, standard errors as `METRIC_stderr`, and the reasons of those that failed.

    `heads` are the tasks that stand for what was asked: a group with a figure of its own, not its members.
    """

    metrics: dict[str, dict[str, float]]
    failures: dict[str, str]
    heads: list[str]


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run. `limit`: documents a task, or below 1 a share of them."""

    limit: float | None = None
    num_fewshot: int | None = None
    cache_requests: bool = False
    rewrite_cache: bool = False
    include_path: Path | None = None


def load_tasks(names: tuple[str, ...], manager: "TaskManager", progress: Progress) -> LoadedTasks:
    """Load every task's data, once for both models; what can't be loaded is a note and a failure."""
    loaded = LoadedTasks(manager, {}, {})
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with progress.task("data of tasks", len(names), "tasks") as advance:
        for name in names:
            try:
                loaded.objects[name] = manager.load([name])
            except Exception as error:  # a task runs its own code and datasets': any error may come
                reason = _reason(error)
                loaded.failures[name] = reason
                hint = "; without a network it needs a copy in datasets' cache" if _offline(error) else ""
                progress.note(f"task {name}: its data can't be loaded: {reason}{hint}")
                if _offline(error):
                    _stop_asking_the_hub()
            advance(1)
    return loaded


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    options: TaskOptions,
    batch_size: int | None,
    progress: Progress,
    description: str,
) -> TaskResults:
    """Run every task that was loaded.

    `batch_size` None leaves it to lm-eval on a GPU. One task's failure leaves the others' results.
    """
    automatic = "auto" if model.device.type == "cuda" else CPU_BATCH
    lm = _Quiet(
        progress, description, pretrained=model, tokenizer=tokenizer, backend="causal",
        batch_size=batch_size or automatic, max_length=_longest(model),
    )  # fmt: skip
    done = TaskResults({}, dict(loaded.failures), [])
    for name, found in loaded.objects.items():
        lm.name = f"{description}: {name}"
        try:
            with _quiet(), _request_cache(options.include_path):
                group = found["groups"].get(name)
                raw = evaluator.simple_evaluate(
                    model=lm, tasks=[group] if group else [*found["tasks"].values()], task_manager=loaded.manager,
                    num_fewshot=options.num_fewshot, limit=options.limit, log_samples=False,
                    cache_requests=options.cache_requests, rewrite_requests_cache=options.rewrite_cache,
                )  # fmt: skip
        except FlapError:
            raise
        except Exception as error:  # tasks run their own code: any error may come
            done.failures[name] = _reason(error)
            progress.note(f"task {name}: {done.failures[name]}")
            continue
        plain = {task: metrics for task, values in raw["results"].items() if (metrics := _plain(values))}
        done.metrics |= plain
        done.heads += [name] if name in plain else [task for task in found["tasks"] if task in plain]
    return done


class _Quiet(HFLM):
    """lm-eval's model with our progress in place of its bars."""

    def __init__(self, progress: Progress, name: str, **kwargs: Any) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(**kwargs)
        self.progress, self.name = progress, name

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._bar(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._bar(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._bar(requests):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        # loglikelihood_rolling asks for a bar of its own here
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    @contextmanager
    def _bar(self, requests: list[Any]) -> Iterator[None]:
        with self.progress.task(self.name, len(requests), "requests") as advance:
            self.set_cache_hook(_Finished(advance))
            yield


class _Finished:
    """lm-eval tells its cache hook of every finished request; ours moves the bar."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.advance(1)


def _longest(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def _plain(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none: 0.5` as `acc: 0.5`; other filters' names stay. Standard errors that are not defined are left out."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's prints on stdout, which is for data, its bar over the building of requests, and its
    questions to git and the system about versions, which we record ourselves."""
    bar = lm_eval.api.task.tqdm
    with (
        redirect_stdout(io.StringIO()),
        _swapped(lm_eval.api.task, "tqdm", functools.partial(bar, disable=True)),
        _swapped(evaluator, "get_git_commit_hash", lambda: None),
        _swapped(evaluator, "add_env_info", lambda _results: None),
    ):
        yield


@contextmanager
def _swapped(where: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


@contextmanager
def _request_cache(include_path: Path | None) -> Iterator[None]:
    """lm-eval's cache of built requests in the user's cache folder, apart for every set of local task files.

    Its own key is the task's name alone, so an edited local task would be answered with the old requests.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    local = task_files_sha256(include_path)[:12] if include_path else "own"
    with _swapped(cache, "PATH", str(root / "flap" / "lm-eval" / version("lm-eval") / local)):
        yield


def _offline(error: BaseException) -> bool:
    return isinstance(error, ConnectionError)


def _stop_asking_the_hub() -> None:
    """After one failure to connect: each further task would wait for five retries again."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _reason(error: BaseException) -> str:
    return first_line(error)[:300]
