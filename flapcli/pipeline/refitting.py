"""The part of `flap apply --sequential` that runs the model: on which windows, where, and in what type."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint import Checkpoint
from flapcli.compensation import Compensation
from flapcli.device import DTYPES, pick_device
from flapcli.loading import quiet_transformers
from flapcli.pipeline.common import Compute
from flapcli.pipeline.texts import redrawn
from flapcli.plan import Plan
from flapcli.progress import Progress
from flapcli.refits import Refits
from flapcli.sequential import How, refit
from flapcli.stats import Stats


@dataclass(frozen=True)
class Fitting:
    """A sequential fit before anything is written: `windows` (nsamples, seqlen), and where they run and how."""

    checkpoint: Checkpoint
    windows: NDArray[np.int64]
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, stats: Stats, stats_path: Path, compute: Compute) -> "Fitting":
        """On the text of the statistics, in the type that they were measured in. Raises as `redrawn` does."""
        quiet_transformers()
        device = pick_device(compute.device)
        windows = redrawn(stats.header, stats_path, checkpoint)
        return cls(checkpoint, windows, device, DTYPES[stats.header.calibration.dtype], compute.batch_size)

    def run(
        self,
        folder: Path,
        plan: Plan,
        compensation: Compensation,
        ridge: float,
        dtype: str | None,
        stay: Collection[int],
        progress: Progress,
        reserve: int,
    ) -> Refits:
        """The fits, in files of `folder`; `dtype` as written (None: as stored), `reserve` as of `refit`."""
        how = How(ridge, DTYPES[dtype] if dtype else None, stay)
        return refit(
            folder, self.checkpoint, plan, compensation, how, self.windows, self.device, self.dtype, self.batch_size,
            progress, reserve,
        )  # fmt: skip
