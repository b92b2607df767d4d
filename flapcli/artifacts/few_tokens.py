"""Statistics of experts that saw few tokens lean towards what is usual in their layer (METHOD.md, Experts)."""

import numpy as np
from numpy.typing import NDArray

FEW = 128  # tokens: what an expert saw, and what is usual in its layer, then weigh the same

Values = NDArray[np.floating]


def over_experts(values: Values, tokens: Values) -> Values:
    """Mean of (experts, ...) over the tokens of all; of experts where none has a token."""
    return np.average(values, axis=0, weights=tokens if tokens.any() else None)


def shrunk(values: Values, usual: Values, tokens: Values) -> Values:
    """(experts, ...) of so many tokens each, shrunk towards `usual`."""
    share = (tokens / (tokens + FEW)).reshape(-1, *(1 for _ in values.shape[1:]))
    return (values * share + usual * (1 - share)).astype(values.dtype)
