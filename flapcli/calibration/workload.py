"""What there is to measure: one process's part of a calibration, with everything decided."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from flapcli.checkpoints import Checkpoint
from flapcli.execution.device import Runtime
from flapcli.execution.ranks import Ranks
from flapcli.progress import Progress, Silent
from flapcli.storage.resume import Resume


@dataclass(frozen=True)
class Workload:
    """This rank's `windows` (n, seqlen) of token ids through the dense model, and what is kept beside moments.

    `gram`: Gram matrices; `fisher`: Fisher information of units, by a backward pass through the activations.
    `resume` None: nothing is saved on the way. `model` is the checkpoint's where it is in memory already, `device_map`
    how it is spread over devices where it is not. `start` is the place of a window's first token that is predicted.
    """

    checkpoint: Checkpoint
    windows: NDArray[np.int64]
    runtime: Runtime
    gram: bool = False
    fisher: bool = False
    progress: Progress = field(default_factory=Silent)
    ranks: Ranks = field(default_factory=Ranks.alone)
    resume: Resume | None = None
    device_map: str | None = None
    model: PreTrainedModel | None = None
    start: int = 1
