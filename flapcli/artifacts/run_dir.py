"""The run folder: where the artifacts of one pruning run lie, and how a stage holds it while it works."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ParamSpec, TypeVar

from flapcli.storage.lock import locked

P = ParamSpec("P")
R = TypeVar("R")


class RunDir:
    """The places of a run's artifacts below `folder`; nothing needs to be there yet."""

    def __init__(self, folder: Path | str = "flap-run") -> None:
        self.path = Path(folder)
        self.stats = self.path / "stats.safetensors"
        self.plan = self.path / "plan.yaml"
        self.pruned = self.path / "pruned"
        self.healed = self.path / "healed"
        self.teacher = self.path / "teacher.safetensors"
        self.eval = self.path / "eval.json"
        self.gguf = self.path / "pruned.gguf"
        self.sweep = self.path / "sweep.json"

    @property
    def names(self) -> list[str]:
        """Of all that is written there."""
        return [path.name for path in vars(self).values() if path != self.path]


def hold(out: Path, rank: int = 0) -> AbstractContextManager[None]:
    """Keep others away from where a stage writes `out`: its run folder, or its own place where it lies elsewhere.

    Processes that torchrun started hold a place each. Raises FlapError where another run is at work there.
    """
    names = RunDir(out.parent).names
    if rank:
        return locked(out.with_name(f".{out.name}.rank-{rank}.lock"), out, [])
    if out.name in names:
        return locked(out.with_name(".flap.lock"), out.parent, names)
    return locked(out.with_name(f".{out.name}.lock"), out, [out.name])


def holding(stage: Callable[P, R]) -> Callable[P, R]:
    """A stage that holds the place of its parameter `out` while it works, or of `run`, a RunDir."""
    signature = inspect.signature(stage)

    @functools.wraps(stage)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        with hold(given["out"] if "out" in given else given["run"].sweep):
            return stage(*args, **kwargs)

    return held
