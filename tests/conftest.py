import os

# No test asks the hub; set before huggingface_hub and datasets are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of two threads each would thrash on two cores
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import typer
from support.models import FEW, make_tiny
from typer.testing import CliRunner, Result

from flapcli.cli.app import app
from flapcli.execution.device import Runtime


@pytest.fixture(scope="session", autouse=True)
def exact_figures() -> None:
    """Where a test asks for no type, models are measured in float32, whatever this machine's processor multiplies."""
    of_eval = Runtime.of_eval
    Runtime.of_eval = lambda how, dtype: of_eval(how, "float32" if dtype == "auto" else dtype)


@pytest.fixture(scope="session", autouse=True)
def no_waiting() -> None:
    """What each of thousands of commands would do again: build all of them from their signatures, wait for the disk."""
    typer.testing._get_command = cache(typer.main.get_command)
    os.fsync = lambda _file: None


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of CONFIGS, made once; tests must not write into it."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="session", params=FEW)
def any_tiny(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    """Some tiny models in turn, with all traits among them."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real text."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(list(topics.values())[:6])[:20000])
    return path


@pytest.fixture(scope="session")
def flap() -> Callable[..., Result]:
    """Runs `flap ARGS` in this process; `code` is the exit code expected."""

    def call(*args: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, f"exit {result.exit_code}: {result.stdout}{result.stderr}"
        return result

    return call


@pytest.fixture(scope="session")
def prune(flap: Callable[..., Result], text_file: Path) -> Callable[..., Path]:
    """Calibrates, plans and applies into a run folder; returns it."""

    def call(model: object, run: Path, plan: str = "--ratio 0.3", apply: str = "") -> Path:
        small = ["--nsamples", "12", "--seqlen", "24", "--dtype", "float32"]
        flap("calibrate", model, "-d", run, "--dataset", text_file, *small)
        flap("plan", "-d", run, *plan.split())
        flap("apply", "-d", run, *apply.split())
        return run

    return call
