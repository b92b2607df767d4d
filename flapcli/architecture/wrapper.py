"""Models of several kinds of input whose text model is of a family: what holds the text model, and where.

A file of wrappers/ describes a model_type of transformers. Only the text model is pruned; all else is carried over.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flapcli.architecture.family import PER_LAYER
from flapcli.storage.record import Record

WRAPPERS = Path(__file__).parent / "wrappers"
AUTO_CLASS = "AutoModelForImageTextToText"


class Wrapper(Record):
    """A model_type `name` and its class `architecture`, in which `layers` are those of the text model.

    config.json has the text model's configuration under the key `text`, or among its own where that is missing; its
    model_type is a family's name, or one that `families` maps to the family that computes the same of text. `names`
    turn names of tensors in files into those of the text model's own class, and those that `carried` matches are of
    other parts. `text_in_class` and `others_in_class` turn the text model's own names and those of other parts into the
    class's, which are what transformers looks for where a class is not of its own. `overrides` is what holds in place
    of the family's description.
    """

    name: str
    covers: str
    architecture: str
    text: str
    layers: str
    families: dict[str, str]
    names: list[tuple[str, str]]
    carried: str
    text_in_class: list[tuple[str, str]]
    others_in_class: list[tuple[str, str]]
    overrides: dict[str, Any]

    def carries(self, theirs: str) -> bool:
        """Whether a tensor is of another part than the text model."""
        return re.search(self.carried, theirs) is not None

    def changed(self, config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """The whole's config.json with changes of the text model's configuration."""
        if self.text not in config:
            return changed(config, changes)
        return dict(config) | {self.text: changed(config[self.text], changes)}


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with changes, and without what it said of single layers, which pruning says anew."""
    return {key: value for key, value in config.items() if key not in PER_LAYER} | dict(changes)


@cache
def wrappers() -> dict[str, Wrapper]:
    """All descriptions in the folder wrappers/, each over what most have."""
    found = {path.stem: json.loads(path.read_bytes()) for path in sorted(WRAPPERS.glob("*.json"))}
    base = found.pop("_wrapper")
    return {name: Wrapper.model_validate(base | own) for name, own in found.items()}
