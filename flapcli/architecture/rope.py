"""Rotary position embeddings as config.json describes them, in the form that GGUF stores."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flapcli.errors import FlapError

# What Meta's releases use; a GGUF stores the factors that follow from them, not the parameters.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

NEVER = 1e30  # divides a frequency so that nothing of it is left


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and parameters, from transformers' new key (rope_parameters) or its old ones.

    Those of full attention where sliding windows have others.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = dict(found.get("full_attention") or found)
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    found["rope_theta"] = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    return found


def llama3_factors(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32]:
    """Llama-3's divisors of the rotary frequencies, (head_dim / 2,), float32.

    Long wavelengths are divided by `factor`, short ones by 1, those between by a blend (transformers,
    modeling_rope_utils, _compute_llama3_parameters). Raises FlapError where a parameter is missing.
    """
    if missing := [key for key in ("factor", *LLAMA3) if key not in rope]:
        raise FlapError(f"config.json: rope scaling llama3 lacks {', '.join(missing)}")
    context, low, high = (float(rope[key]) for key in ("original_max_position_embeddings", *list(LLAMA3)[:2]))
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).astype(np.float32)


def rotated(rope: dict[str, Any], head_dim: int) -> int:
    """Channels of a head that are rotated, its first."""
    return int(head_dim * (rope.get("partial_rotary_factor") or 1.0))


def rope_divisors(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32] | None:
    """Divisors of the frequencies of a rotation of whole heads, (head_dim / 2,), that make it this one; None for ones.

    Frequencies fall over the rotated channels alone; those of the rest become none.
    """
    rotary = rotated(rope, head_dim)
    scaled = llama3_factors(rope, rotary) if rope["rope_type"] == "llama3" else None
    if rotary == head_dim:
        return scaled
    place = np.arange(0, rotary, 2, dtype=np.float64)
    found = float(rope["rope_theta"]) ** (place / rotary - place / head_dim) * (1 if scaled is None else scaled)
    return np.append(found, np.full((head_dim - rotary) // 2, NEVER)).astype(np.float32)


def llama3_parameters(factors: NDArray[np.float32], theta: float) -> dict[str, Any] | None:
    """The rope parameters of which `factors`, (head_dim / 2,), are Llama-3's divisors; None where they are none's."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max()), **LLAMA3}
    same = np.allclose(llama3_factors(rope, 2 * len(factors)), factors, rtol=1e-5, atol=0)
    return rope if same else None
