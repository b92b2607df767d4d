"""One rank of a calibration for tests: python rank.py ARGUMENTS... with RANK, WORLD_SIZE, MASTER_* set.

DIE_RANK and DIE_AFTER (batches) make that rank die by SIGKILL, or FAIL by an error of its own.
"""

import os
import signal
import sys

import torch

from flapcli.cli import app
from flapcli.errors import FlapError
from flapcli.recording import Recorder

torch.set_num_threads(1)
if os.environ.get("DIE_RANK") == os.environ["RANK"]:
    commit, left = Recorder.commit, [int(os.environ["DIE_AFTER"])]

    def dying(self: Recorder) -> None:
        commit(self)
        left[0] -= 1
        if left[0] < 0:
            if os.environ.get("FAIL"):
                raise FlapError("this rank's own trouble")
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.commit = dying  # type: ignore[method-assign]

app(sys.argv[1:])
