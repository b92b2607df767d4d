"""lm-eval's tasks on a model in memory, through its Python interface."""

import functools
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import datasets
import huggingface_hub.constants
import lm_eval.api.task
from lm_eval import evaluator
from lm_eval.caching import cache
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flapcli.artifacts.eval_report import Measurement
from flapcli.checkpoints.hub_errors import is_unreached
from flapcli.errors import FlapError, first_line
from flapcli.evaluation.task_names import average, task_files_sha256
from flapcli.execution.settings import EvalOptions
from flapcli.progress import Progress

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

CPU_BATCH = 8  # requests; on a GPU lm-eval finds the largest that fits


@dataclass(frozen=True)
class Tasks:
    """The tasks that `options` names, and once loaded their data."""

    options: EvalOptions
    manager: "TaskManager"
    cache_requests: bool = False
    rewrite_cache: bool = False
    objects: dict[str, Any] = field(default_factory=dict)

    def load(self, progress: Progress) -> Self:
        """Load every task's data, once for both models. Raises FlapError that names all that can't be loaded."""
        failures: dict[str, str] = {}
        datasets.disable_progress_bars()
        for library in ("datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)
        with progress.task("data of tasks", len(self.options.tasks), "tasks") as advance:
            for name in self.options.tasks:
                try:
                    self.objects[name] = self.manager.load([name])
                except Exception as error:  # a task runs its own code and datasets': any error may come
                    offline = is_unreached(error)
                    failures[name] = _reason(error) + ("; it is not in datasets' cache" if offline else "")
                    if offline:  # ask no more: each further task would wait for five retries again
                        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
                advance(1)
        if failures:
            first = next(iter(failures.values()))
            raise FlapError(
                f"the data of {len(failures)} tasks can't be loaded ({', '.join(failures)}): {first}: leave them out "
                "of --tasks, or load them once with a network"
            )
        return self

    def run(
        self,
        found: Measurement,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None,
        progress: Progress,
        label: str,
    ) -> None:
        """Run every task that was loaded and put the figures into `found`; one's failure leaves the others' results.

        `batch_size` None leaves it to lm-eval on a GPU.
        """
        lm = _Quiet(
            progress, label, pretrained=model, tokenizer=tokenizer, backend="causal",
            batch_size=batch_size or ("auto" if model.device.type == "cuda" else CPU_BATCH),
            max_length=getattr(model.config, "max_position_embeddings", None),
        )  # fmt: skip
        found.task_failures = {}
        heads: list[str] = []  # what stands for a name that was asked: a group's own figure, else its members'
        for name, parts in self.objects.items():
            lm.name = f"{label}: {name}"
            try:
                with _quiet(), _request_cache(self.options.include_path):
                    group = parts["groups"].get(name)
                    raw = evaluator.simple_evaluate(
                        model=lm, tasks=[group] if group else [*parts["tasks"].values()], task_manager=self.manager,
                        num_fewshot=self.options.num_fewshot, limit=self.options.limit, log_samples=False,
                        cache_requests=self.cache_requests, rewrite_requests_cache=self.rewrite_cache,
                    )  # fmt: skip
            except FlapError:
                raise
            except Exception as error:  # tasks run their own code: any error may come
                found.task_failures[name] = _reason(error)
                progress.note(f"task {name}: {found.task_failures[name]}")
                continue
            plain = {task: metrics for task, values in raw["results"].items() if (metrics := _plain(values))}
            found.tasks |= plain
            heads += [name] if name in plain else [task for task in parts["tasks"] if task in plain]
        found.averaged_tasks, found.task_average = average({task: found.tasks[task] for task in heads})


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
            # lm-eval tells its cache hook of every finished request; ours moves the bar.
            self.set_cache_hook(SimpleNamespace(add_partial=lambda *_: advance(1)))
            yield


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
def _request_cache(include_path: str | None) -> Iterator[None]:
    """lm-eval's cache of built requests in the user's cache folder, apart for every set of local task files.

    Its own key is the task's name alone, so an edited local task would be answered with the old requests.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    local = task_files_sha256(Path(include_path))[:12] if include_path else "own"
    with _swapped(cache, "PATH", str(root / "flap" / "lm-eval" / version("lm-eval") / local)):
        yield


def _reason(error: BaseException) -> str:
    return first_line(error)[:300]
