"""What there is to measure: one process's part of a calibration, with everything decided."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from flapcli.calibration.fisher import Sample
from flapcli.checkpoints import Checkpoint
from flapcli.execution.device import Runtime
from flapcli.execution.ranks import Ranks
from flapcli.progress import Progress, Silent
from flapcli.storage.resume import Resume


@dataclass(frozen=True)
class Workload:
    """This rank's `windows` (n, seqlen) of token ids through the dense model, and what is kept beside moments.

    `gram`: Gram matrices; `fisher`: of which windows Fisher information of units, by a backward pass through the
    activations; None: none.
    `resume` None: nothing is saved on the way. `model` is the checkpoint's where it is in memory already, `device_map`
    how it is spread over devices where it is not.
    """

    checkpoint: Checkpoint
    windows: NDArray[np.int64]
    runtime: Runtime
    gram: bool = False
    fisher: Sample | None = None
    progress: Progress = field(default_factory=Silent)
    ranks: Ranks = field(default_factory=Ranks.alone)
    resume: Resume | None = None
    device_map: str | None = None
    model: PreTrainedModel | None = None
