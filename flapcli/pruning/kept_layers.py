"""Which layers a pruned checkpoint has: those that a plan empties whole are dropped, and the others move up."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flapcli.artifacts.plan import Plan
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError


@dataclass(frozen=True)
class KeptLayers:
    """The layers of the source that are written, ascending, and the keys of config.json that follow them.

    `acting` are layers without units that are written all the same, since their biases go on acting.
    """

    source_indices: tuple[int, ...]
    config_fields: dict[str, Any]
    acting: tuple[int, ...] = ()

    @cached_property
    def written_index(self) -> dict[int, int]:
        """Index in the source to index in the pruned checkpoint."""
        return {source: place for place, source in enumerate(self.source_indices)}


def kept_layers_of(checkpoint: Checkpoint, plan: Plan, adds_bias: bool, masked: bool) -> KeptLayers:
    """What becomes of the layers in which the plan keeps nothing.

    A layer is dropped where nothing of it would act: no unit, no norm on the stream, and no bias on an output
    projection, of the model's own or (`adds_bias`) of compensation. Masked, all are kept; and where none would be, all
    are. Raises FlapError where config.json has another number of entries for layers than layers.
    """
    every = tuple(range(checkpoint.shape.num_layers))
    empty = [i for i in every if not any(len(plan.kept(i, module)) for module in plan.modules)]
    acting = tuple(i for i in empty if adds_bias or checkpoint.family.norms_stream or _has_bias(checkpoint, i))
    dropped = set(empty) - set(acting)
    if masked or not dropped or len(dropped) == len(every):
        return KeptLayers(every, {}, () if masked else acting)
    kept = tuple(i for i in every if i not in dropped)
    return KeptLayers(kept, _config_fields(checkpoint, kept), acting)


def _has_bias(checkpoint: Checkpoint, layer: int) -> bool:
    family = checkpoint.family
    return any(f"{family.output(layer, module)}.bias" in checkpoint.tensors for module in family.modules)


def _config_fields(checkpoint: Checkpoint, kept: tuple[int, ...]) -> dict[str, Any]:
    """The number of layers and all that stands for single layers, as transformers reads it from the source.

    Lists that its configuration class makes from a period or a threshold are written out: layers at new indices
    would fall into other places of the pattern.
    """
    family, count = checkpoint.family, checkpoint.shape.num_layers
    known = checkpoint.config | {
        key: value
        for key in (*family.per_layer_lists, *family.leading_layer_counts)
        if (value := getattr(checkpoint.load_config(), key, None)) is not None
    }
    fields: dict[str, Any] = {str(family.sizes["num_layers"]): len(kept)}
    for key in family.per_layer_lists:
        if isinstance(entries := known.get(key), list):
            if len(entries) != count:
                raise FlapError(
                    f"{checkpoint.name}: {key} in config.json has {len(entries)} entries for {count} layers"
                )
            fields[key] = [entries[i] for i in kept]
    for key in family.leading_layer_counts:
        if isinstance(first := known.get(key), int):
            fields[key] = sum(i < first for i in kept)
    for key, power in family.depth_scales.items():
        fields[key] = checkpoint.setting(key) * (len(kept) / count) ** power
    lacking = [checkpoint.lacks(i, "experts") for i in kept] if family.patterns else []
    for key, value in family.patterns.items():
        listed = [place for place, lacks in enumerate(lacking) if lacks == (value == "-experts")]
        fields[key] = listed if isinstance(value, str) else value
    return fields
