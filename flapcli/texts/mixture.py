"""What `--dataset` names: one text, or several with the share of the calibration windows that each gives."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import isfile  # which is False, where Path.is_file raises, for what is too long to be a name
from pathlib import Path

from flapcli.errors import UsageError
from flapcli.texts.corpus import NAMED, check_source, may_hold_chats, source_sha256

SELF = "self"  # text that the model itself writes
PART = re.compile(r"(?P<source>.+?):(?P<weight>\d+(?:\.\d+)?(?:e-\d+)?)(?:\+|$)")


@dataclass(frozen=True)
class Mixture:
    """Sources in the order named, with weights that sum to about 1."""

    sources: tuple[str, ...]
    weights: tuple[float, ...]

    @classmethod
    def read(cls, text: str) -> "Mixture":
        """From what `combined` wrote, and stats files and pruned folders hold as their dataset."""
        parts = list(PART.finditer(text))
        if isfile(text) or len(parts) < 2 or "".join(part.group() for part in parts) != text:
            return cls((text,), (1.0,))
        return cls(tuple(part["source"] for part in parts), tuple(float(part["weight"]) for part in parts))

    @property
    def named(self) -> list[str]:
        """Values of `--dataset` that `combined` makes this of."""
        if len(self.sources) == 1:
            return list(self.sources)
        return [f"{source}:{weight:g}" for source, weight in zip(self.sources, self.weights, strict=True)]

    def absolute(self) -> "Mixture":
        """The same texts by names that hold in every folder: a file by its absolute path."""
        sources = (source if source in (*NAMED, SELF) else str(Path(source).absolute()) for source in self.sources)
        return Mixture(tuple(sources), self.weights)

    @property
    def name(self) -> str:
        """One name for all, which `read` reads."""
        return "+".join(self.named)

    def counts(self, nsamples: int) -> list[int]:
        """Windows of each source, by largest remainder (the first named wins a tie); they sum to `nsamples`.

        Raises UsageError where a source would get none.
        """
        quotas = [nsamples * weight / sum(self.weights) for weight in self.weights]
        found = [math.floor(quota) for quota in quotas]
        largest = sorted(range(len(quotas)), key=lambda i: found[i] - quotas[i])
        for i in largest[: nsamples - sum(found)]:
            found[i] += 1
        if 0 in found:
            none = self.sources[found.index(0)]
            raise UsageError(
                f"--dataset {none}: its share of {nsamples} windows is none: raise its weight, or --nsamples (--tokens "
                "of heal)"
            )
        return found

    @property
    def may_hold_chats(self) -> bool:
        """Whether a source is of a kind that can hold chat messages."""
        return any(map(may_hold_chats, self.sources))

    def check(self) -> None:
        """Raise UsageError unless every source is `self`, a known name or a file of a type that we read."""
        for source in self.sources:
            if source != SELF:
                check_source(source, "--dataset", (*NAMED, SELF))

    def sha256(self) -> str | None:
        """Hash of the texts that lie on this machine; None where none does."""
        hashes = {source: source_sha256(source) for source in self.sources if source != SELF}
        if len(self.sources) == 1 or not any(hashes.values()):
            return next(iter(hashes.values()), None)
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def combined(named: Sequence[str]) -> str:
    """Values of `--dataset`, each NAME, PATH or either with `:WEIGHT`, as one name: `a`, or `a:0.75+b:0.25`.

    Without a weight a source has 1. Raises UsageError for weights that are no positive numbers, and for a source
    that is named twice, whose windows would be the same ones again.
    """
    sources, weights = zip(*map(_source_and_weight, named), strict=True)
    if twice := next((source for source in sources if sources.count(source) > 1), None):
        raise UsageError(f"--dataset {twice} is given twice: give it once, with a larger weight")
    if len(sources) == 1:
        return sources[0]
    return Mixture(sources, tuple(float(f"{w / sum(weights):.6g}") for w in weights)).name


def _source_and_weight(value: str) -> tuple[str, float]:
    source, colon, tail = value.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return value, 1.0
    if not colon or isfile(value):
        return value, 1.0
    if not 0 < weight < math.inf:
        raise UsageError(f"--dataset {value}: a weight is a positive number")
    return source, weight
