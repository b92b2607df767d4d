"""What the kept channels owe for the pruned ones (METHOD.md, Compensation).

P pruned, K kept channels of one output projection with weight W (out, channels).
"""

import torch


def bias_correction(weight: torch.Tensor, pruned: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """W_P mu_P: what the pruned channels add to the output on average, float64 (out,).

    `weight` (out, channels) of any floating dtype, `pruned` indices of P, `mean` mu (channels,).
    Source: the paper, section "Baseline bias compensation"; METHOD.md, Compensation, bias.
    """
    return weight[:, pruned].double() @ mean[pruned].double()
