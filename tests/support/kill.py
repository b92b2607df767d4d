"""Kills real processes at random points: `flap` commands in forks of this process, so that a try costs no import.

    python tests/support/kill.py TASK.json

The task: `expected` and `result` are arguments of flap and where their artifact lies; `setup` is Python to run
first. The first command runs undisturbed. Then tries of the second are ended by SIGKILL after a random share of
the time that the first took, each going on with whatever the one before left, until `kills` were killed. Whenever
an artifact is there it must equal the expected one in every byte. Prints what happened as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import flapcli.calibration.job
import flapcli.pruning.companions
import flapcli.pruning.sequential
import flapcli.pruning.slicing  # noqa: F401
from flapcli.cli.app import app


def start(arguments: list[str], log: Path) -> int:
    """A child that runs one command and exits with its code."""
    child = os.fork()
    if child:
        return child
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        app(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    exec(task["setup"], {})
    log = Path(sys.argv[1]).with_suffix(".log")
    (expected_arguments, expected_path), (arguments, result) = (
        (task[name]["arguments"], Path(task[name]["path"])) for name in ("expected", "result")
    )
    began = time.monotonic()
    assert wait(start(expected_arguments, log)) == 0, log.read_text()
    takes = time.monotonic() - began
    expected = contents(expected_path)
    draw = random.Random(task["seed"])
    outcome = {"killed": 0, "finished": 0, "seconds": round(takes, 2)}
    while True:
        child = start(arguments, log)
        if outcome["killed"] < task["kills"]:
            time.sleep(takes * draw.uniform(0.05, 1))
            os.kill(child, signal.SIGKILL)
        code = wait(child)
        assert code in (0, -signal.SIGKILL), log.read_text()
        if result.exists():
            assert contents(result) == expected, f"after {outcome}: {result} is there and is not what it should be"
            shutil.rmtree(result) if result.is_dir() else result.unlink()
        if code == 0 and outcome["killed"] == task["kills"]:
            break
        outcome["killed" if code else "finished"] += 1
    assert [path.name for path in result.parent.iterdir()] == [], "something is left behind"
    outcome["went_on"] = log.read_text().count("going on")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
