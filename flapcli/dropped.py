"""Layers that a plan empties whole leave the checkpoint: the others move up, and config.json says so."""

import re
from dataclasses import dataclass, replace
from typing import Any

from flapcli.apply import Job
from flapcli.checkpoint.base import Checkpoint
from flapcli.errors import FlapError
from flapcli.plan import Plan
from flapcli.shape import MODULES


@dataclass(frozen=True)
class Depth:
    """The layers of the source that are written, ascending, and the keys of config.json that follow them.

    `acting` are layers without units that are written all the same, since their biases go on acting.
    """

    stay: tuple[int, ...]
    fields: dict[str, Any]
    acting: tuple[int, ...] = ()


def depth_of(checkpoint: Checkpoint, plan: Plan, adds_bias: bool, mask_only: bool) -> Depth:
    """What becomes of the layers in which the plan keeps nothing.

    A layer goes where nothing of it would act: no unit, and no bias on an output projection, of the model's own
    or (`adds_bias`) of compensation. Masked, all stay; and where none would, all do. Raises FlapError where
    config.json has another number of entries for layers than layers.
    """
    every = tuple(range(checkpoint.shape.num_layers))
    empty = [i for i in every if not any(len(plan.kept(i, module)) for module in MODULES)]
    acting = tuple(i for i in empty if adds_bias or _has_bias(checkpoint, i))
    gone = set(empty) - set(acting)
    if mask_only or not gone or len(gone) == len(every):
        return Depth(every, {}, () if mask_only else acting)
    stay = tuple(i for i in every if i not in gone)
    return Depth(stay, _fields(checkpoint, stay), acting)


def _has_bias(checkpoint: Checkpoint, layer: int) -> bool:
    return any(f"{checkpoint.family.output(layer, module)}.bias" in checkpoint.tensors for module in MODULES)


def _fields(checkpoint: Checkpoint, stay: tuple[int, ...]) -> dict[str, Any]:
    """The number of layers and all that stands for single layers, as transformers reads it from the source.

    Lists that its configuration class makes from a period or a threshold are written out: renumbered layers
    would fall into other places of the pattern.
    """
    family, count = checkpoint.family, checkpoint.shape.num_layers
    known = checkpoint.config | {
        key: value
        for key in (*family.per_layer, *family.leading)
        if (value := getattr(checkpoint.load_config(), key, None)) is not None
    }
    fields: dict[str, Any] = {family.sizes["num_layers"]: len(stay)}
    for key in family.per_layer:
        if isinstance(entries := known.get(key), list):
            if len(entries) != count:
                raise FlapError(
                    f"{checkpoint.name}: {key} in config.json has {len(entries)} entries for {count} layers"
                )
            fields[key] = [entries[i] for i in stay]
    for key in family.leading:
        if isinstance(first := known.get(key), int):
            fields[key] = sum(i < first for i in stay)
    return fields


def renumbered(work: list[Job], checkpoint: Checkpoint, depth: Depth) -> list[Job]:
    """The jobs without those of layers that go, tensors of the others under their new layer's name."""
    place = {layer: new for new, layer in enumerate(depth.stay)}
    before, after = checkpoint.family.layer.split("{i}")
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}\.")
    made = []
    for job in work:
        found = [pattern.match(spec.name) for spec in job.outputs]
        if not all(match is None or int(match[1]) in place for match in found):
            continue
        specs = [
            spec if match is None else replace(spec, name=_moved(spec.name, match, place))
            for spec, match in zip(job.outputs, found, strict=True)
        ]
        made.append(Job(tuple(specs), job.make))
    return made


def _moved(name: str, match: re.Match[str], place: dict[int, int]) -> str:
    return f"{name[: match.start(1)]}{place[int(match[1])]}{name[match.end(1) :]}"
