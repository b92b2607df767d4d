"""What the walks of a streamed calibration over a model's layers share."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.device import Batches
from flapcli.hidden import HiddenStates
from flapcli.layers import Front
from flapcli.progress import Progress
from flapcli.ranks import Ranks
from flapcli.recording import Recorder
from flapcli.stats import StatsWriter


@dataclass
class Walk:
    """One streamed calibration of this rank's `windows` (n, seqlen); the writer is rank 0's."""

    checkpoint: Checkpoint
    windows: NDArray[np.int64]
    device: torch.device
    hidden: HiddenStates
    front: Front
    recorder: Recorder
    batches: Batches
    ranks: Ranks
    writer: StatsWriter | None
    model: torch.nn.Module
    progress: Progress

    def tokens(self, part: slice) -> torch.Tensor:
        """Token ids of a batch, (batch, seqlen) int64."""
        return torch.from_numpy(self.windows[part])
