"""Whether a pruned folder can be a stock checkpoint of its family, which every runtime loads.

It can where every layer keeps the same sizes and the family's own configuration can say which projections
have biases (those that it would add beside compensation's are written as zeros).
"""

from dataclasses import dataclass
from typing import Any

from flapcli.checkpoint.base import Checkpoint
from flapcli.dropped import Depth
from flapcli.errors import first_line
from flapcli.safetensors_io import TensorSpec
from flapcli.shape import MODULES, LayerShape, Module


@dataclass(frozen=True)
class Stock:
    """What of config.json changes, and the biases of zeros that the family's configuration brings with it."""

    fields: dict[str, Any]
    zero_biases: list[TensorSpec]


def as_stock(
    checkpoint: Checkpoint, layers: tuple[LayerShape, ...], depth: Depth, adds_bias: bool, dtype: str
) -> tuple[Stock | None, str]:
    """The stock form of a pruned checkpoint with `layers`, those of `depth`, or None; and the reason, for people.

    `dtype` is the safetensors code of the written weights.
    """
    family = checkpoint.family
    if len(set(layers)) > 1:
        return None, "layers keep different sizes"
    [even] = set(layers)
    if 0 in even:
        return None, "modules are pruned away whole"
    wanted = [module for module in MODULES if _gains_bias(checkpoint, module, adds_bias)]
    unsaid = [family.module(module).output for module in wanted if module not in family.bias_options]
    if unsaid:
        return None, f"{family.architecture} knows no bias on {' and '.join(unsaid)}"
    fields: dict[str, Any] = {family.sizes[size]: getattr(even, size) for size in LayerShape._fields} | depth.fields
    fields |= {family.sizes["head_dim"]: checkpoint.shape.head_dim}
    fields |= {family.bias_options[module]: True for module in wanted}
    if refusal := _refused(checkpoint, fields):
        return None, refusal
    zeros = [
        TensorSpec(
            f"{family.layer.format(i=i)}.{producer}.bias",
            (getattr(layer, size) * checkpoint.shape.rows_per(size),),
            dtype,
        )
        for i, (source, layer) in enumerate(zip(depth.stay, layers, strict=True))
        for module in wanted
        for producer, size in family.module(module).producers.items()
        if f"{family.layer.format(i=source)}.{producer}.bias" not in checkpoint.tensors
    ]
    return Stock(fields, zeros), "every layer keeps the same sizes"


def _gains_bias(checkpoint: Checkpoint, module: Module, adds_bias: bool) -> bool:
    """Whether the module's output projection has a bias that the source's own configuration does not say."""
    output = checkpoint.family.module(module).output
    if output in checkpoint.config.get("flap", {}).get("biases", []) and "modules" in checkpoint.config["flap"]:
        return True
    return adds_bias and f"{checkpoint.family.output(0, module)}.bias" not in checkpoint.tensors


def _refused(checkpoint: Checkpoint, fields: dict[str, Any]) -> str | None:
    """What transformers' own configuration class has against the sizes, such as heads that do not divide h."""
    from transformers import AutoConfig

    config = {k: v for k, v in checkpoint.config.items() if k not in ("flap", "auto_map", "model_type")}
    try:
        AutoConfig.for_model(checkpoint.family.model_type, **config | fields)
    except Exception as error:  # strict dataclasses wrap what their validators raise in classes of their own
        lines = str(error).strip().splitlines() or [first_line(error)]
        return f"transformers refuses the sizes: {lines[-1].strip()}"
    return None
