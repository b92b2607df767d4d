"""Norms of an output projection's weight columns, which the metrics multiply activations' moments by."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

ROWS = 128  # summed at once


@dataclass(frozen=True)
class ColumnNorms:
    """Of every column: sum of squares and mean of magnitudes, float32 (channels,)."""

    square_sum: NDArray[np.float32]
    abs_mean: NDArray[np.float32]

    @classmethod
    def of(cls, weight: torch.Tensor) -> "ColumnNorms":
        """From the weight (out, channels) as stored, where it lies; sums in float64, some rows at a time."""
        squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        magnitudes = torch.zeros_like(squares)
        for rows in weight.split(ROWS):
            part = rows.float()
            squares += part.square().sum(0, dtype=torch.float64)
            magnitudes += part.abs().sum(0, dtype=torch.float64)
        return cls(squares.float().cpu().numpy(), (magnitudes / len(weight)).float().cpu().numpy())
