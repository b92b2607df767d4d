"""Checkpoints whose names and tensors on disk are not those of a family of transformers, and which one they are.

A file of sources/ describes the files of a model_type that only its publisher's own code reads, such as Baichuan's:
how each tensor of the family that computes the same is made of theirs. No such code is run, and what flap writes is of
the family.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.family import Refusal, Setting, chosen, refuse, renamed
from flapcli.architecture.rows import RowMap, Symbols
from flapcli.errors import FlapError
from flapcli.storage.record import Record

SOURCES = Path(__file__).parent / "sources"
# What configurations of all kinds call the same, and what of it may be missing.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARED = ("dtype", "torch_dtype", "use_cache", "initializer_range", "quantization_config", "_attn_implementation")


class Place(NamedTuple):
    """Where files hold a tensor: one of theirs by its name, or some rows of it, which are perhaps to be normalised."""

    name: str
    rows: NDArray[np.int64] | None = None
    is_normalised: bool = False


class Split(Record):
    """A projection that holds several: whose each of its rows is (`architecture.rows`), and theirs, by symbols."""

    rows: Symbols
    into: list[str]


class Source(Record):
    """Checkpoints of the model_type `name`, to be read as those of the family `converts_to`.

    `config` maps keys of the family's configuration to theirs, or to a product or quotient of them and numbers;
    `defaults` are what their configuration class makes of missing keys, `fixed` what the family's says of what theirs
    has no key for. `requires` are values for which the two compute the same. `splits` are projections, by their names
    below a layer, `names` turn all other names into the family's, and tensors that match `ignored` no runtime reads.
    The rows of `normalised` tensors, by the family's names, are divided by their lengths. `variants` are what holds in
    its place `when` keys have certain values, or `unless` they have.
    """

    name: str
    covers: str
    converts_to: str
    config: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any]
    requires: dict[str, list[Any]]
    refuses: list[Refusal]
    splits: dict[str, Split]
    names: list[tuple[str, str]]
    ignored: str
    normalised: list[str]
    notes: str

    def native_config(self, theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
        """config.json as the family's. Raises FlapError for a model that the family does not compute."""
        known = self.defaults | dict(theirs)
        refuse(self.refuses, known.get, where)
        for key, values in self.requires.items():
            if known.get(key) not in values:
                raise FlapError(
                    f"{where}: {key} is {known.get(key)!r:.80}, where only {values[0]!r} makes a {self.name} model "
                    f"compute what {self.converts_to} does"
                )
        config = {key: _value(expression, known, f"{where}: config.json") for key, expression in self.config.items()}
        shared = {key: theirs[key] for key in SHARED if key in theirs}
        tokens = {key: theirs.get(key) for key in TOKENS}
        return {"model_type": self.converts_to} | shared | tokens | config | self.fixed

    def places(self, theirs: str, count: int, sizes: Mapping[str, int]) -> Iterator[tuple[str, Place]]:
        """The family's tensors that are made of one of theirs, of `count` rows; none of what no runtime reads.

        Raises FlapError where the sizes make another number of rows.
        """
        if re.search(self.ignored, theirs):
            return
        for projection, split in self.splits.items():
            before, found, leaf = theirs.rpartition(f".{projection}.")
            if found:
                apart = RowMap.of(split.rows, sizes).split(sizes)
                if (expected := sum(len(rows) for rows in apart)) != count:
                    raise FlapError(
                        f"tensor {theirs} has {count} rows, expected {expected} by the sizes in config.json"
                    )
                for part, rows in zip(split.into, apart, strict=True):
                    yield f"{renamed(f'{before}.', self.names)}{part}.{leaf}", Place(theirs, rows)
                return
        name = renamed(theirs, self.names)
        yield name, Place(theirs, is_normalised=name in self.normalised)


def _value(expression: str, known: Mapping[str, Any], where: str) -> Any:
    """A key's value, or a product or quotient of keys and numbers. Raises FlapError for what is missing or is none."""
    over, _, below = expression.partition("/")
    factors = over.split("*")
    if missing := [key for key in factors if not key.isdigit() and key not in known]:
        raise FlapError(f"{where} lacks {missing[0]}")
    if expression in known:
        return known[expression]
    values = [int(factor) if factor.isdigit() else known[factor] for factor in factors]
    if odd := [key for key, value in zip(factors, values, strict=True) if type(value) not in (int, float)]:
        raise FlapError(f"{where}: {odd[0]} is {known[odd[0]]!r:.60}, where a number is wanted")
    return prod(values) // int(below) if below else prod(values)


@cache
def _descriptions() -> dict[str, dict[str, Any]]:
    """By model_type, each over what most have nothing of."""
    found = {path.stem: json.loads(path.read_bytes()) for path in sorted(SOURCES.glob("*.json"))}
    base = found.pop("_source")
    return {name: base | own for name, own in found.items()}


@cache
def sources() -> dict[str, Source]:
    """All descriptions in the folder sources/, each without its variants."""
    return {name: _without_variants(description) for name, description in _descriptions().items()}


def _without_variants(description: dict[str, Any]) -> Source:
    return Source.model_validate({key: value for key, value in description.items() if key != "variants"})


def source_of(model_type: object, setting: Setting) -> Source | None:
    """The source that a configuration is of, in its variant; None of one that transformers reads itself."""
    if not (description := _descriptions().get(str(model_type))):
        return None
    for changes in chosen(description.get("variants", []), setting):
        description = description | changes
    return _without_variants(description)
