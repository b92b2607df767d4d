"""Starts commands of flap as forks of this process, so that only one process pays for the imports.

As a program it starts groups of ranks. Reads jobs as JSON lines: `arguments` of flap, and `ranks`, a list of
environments. Answers each with one JSON line, the exit code, stdout and stderr of every rank. DIE_AFTER in an
environment makes that rank die by SIGKILL after so many batches, or solves, and FAIL by an error of its own; LATE has
it begin so many seconds after the others.
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.mistral import modeling_mistral  # noqa: F401

import flapcli.calibration.job
import flapcli.healing.distillation
import flapcli.pruning.companions
import flapcli.pruning.sequential
import flapcli.pruning.shared_solves
import flapcli.pruning.slicing  # noqa: F401
from flapcli.calibration.recorder import Recorder
from flapcli.cli.app import app
from flapcli.errors import FlapError
from flapcli.pruning.sequential_fit import StoredFits


def start(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> int:
    """A child that runs one command, appends what it says to files and exits with its code."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        signal.alarm(90)  # a rank that hangs ends, and fails its test
        os.environ.update(environment)
        torch.set_num_threads(1)
        time.sleep(float(environment.get("LATE", 0)))
        if "DIE_AFTER" in environment:
            die_after(int(environment["DIE_AFTER"]))
        app(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_after(steps: int) -> None:
    left = [steps]

    def dying(step: Callable[..., None]) -> Callable[..., None]:
        def taken(*given: Any) -> None:
            step(*given)
            left[0] -= 1
            if left[0] < 0:
                if "FAIL" in os.environ:
                    raise FlapError("this rank's own trouble")
                os.kill(os.getpid(), signal.SIGKILL)

        return taken

    Recorder.commit = dying(Recorder.commit)  # type: ignore[method-assign]
    StoredFits.put = dying(StoredFits.put)  # type: ignore[method-assign]


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as scratch:
            files = [(Path(scratch, f"{i}.out"), Path(scratch, f"{i}.err")) for i in range(len(job["ranks"]))]
            children = [start(job["arguments"], env, *f) for env, f in zip(job["ranks"], files, strict=True)]
            codes = [wait(child) for child in children]
            texts = [(out.read_text(), err.read_text()) for out, err in files]
        answer = [(code, out, err) for code, (out, err) in zip(codes, texts, strict=True)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
