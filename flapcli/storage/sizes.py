"""Sizes and counts as people type them: 5GB, 1.5B."""

import re
from fractions import Fraction

from flapcli.errors import UsageError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SCALES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_share(text: str, option: str) -> Fraction | None:
    """75% as 3/4; None for what is no percentage. Raises UsageError naming the option for one beyond 100."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip(), re.ASCII)
    share = Fraction(match[1]) / 100 if match else None
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"{option} {text}: give a share of the dense model, more than 0% and at most 100%")
    return share


def parse_size(text: str, option: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` or `2GiB`. Raises UsageError naming the option."""
    number = text.upper().rstrip("KMGIB")
    try:
        size = int(float(number) * (UNITS[unit] if (unit := text.upper()[len(number) :]) else 1))
    except (ValueError, KeyError, OverflowError) as error:
        raise UsageError(f"{option} {text}: give a size such as 5GB, 500MB or 2GiB") from error
    if size <= 0:
        raise UsageError(f"{option} {text}: must be more than 0")
    return size


def parse_count(text: str, option: str) -> int:
    """Parameters of a count such as `100M`, `1.5B` or `250000`. Raises UsageError naming the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper(), re.ASCII)
    count = int(Fraction(match[1]) * SCALES[match[2]]) if match else 0
    if count < 1:
        raise UsageError(f"{option} {text}: give a number of parameters such as 100M, 1.5B or 250000")
    return count
