"""Whether a pruned folder can be a stock checkpoint of its family, which every runtime loads.

It can where every layer keeps the same sizes and the family's own configuration can say which projections
have biases (those that it would add beside compensation's are written as zeros).
"""

from dataclasses import dataclass
from typing import Any

from flapcli.architecture.shape import MODULES, LayerShape, Module
from flapcli.checkpoints import Checkpoint
from flapcli.errors import first_line
from flapcli.pruning.kept_layers import KeptLayers


@dataclass(frozen=True)
class StockForm:
    """What of config.json changes, and names and shapes of biases of zeros that the configuration brings with it."""

    config_fields: dict[str, Any]
    zero_biases: dict[str, tuple[int, ...]]


def stock_form_of(
    checkpoint: Checkpoint, sizes: tuple[LayerShape, ...], layers: KeptLayers, adds_bias: bool
) -> tuple[StockForm | None, str]:
    """The stock form of a pruned checkpoint whose written layers have these sizes, or None; and why, for people."""
    family = checkpoint.family
    if len(set(sizes)) > 1:
        return None, "layers keep different sizes"
    [even] = set(sizes)
    if 0 in even:
        return None, "modules are pruned away whole"
    biased = [module for module in MODULES if _gains_bias(checkpoint, module, adds_bias)]
    unsaid = [family.module(module).output for module in biased if module not in family.bias_options]
    if unsaid:
        return None, f"{family.architecture} knows no bias on {' and '.join(unsaid)}"
    if family.attention.head_arguments and even.num_attention_heads != checkpoint.sizes["num_attention_heads"]:
        return None, f"{family.architecture} gives every head a slope by its number, which those that stay would change"
    wanted = even._asdict() | {"head_dim": checkpoint.shape.head_dim}
    keys = {size: key for size, key in family.sizes.items() if isinstance(key, str)}
    fields = {key: wanted[size] for size, key in keys.items() if size in wanted} | layers.config_fields
    if told := _untold(checkpoint, even):
        return None, f"config.json of {family.architecture} has no key for its {told}"
    fields |= {family.bias_options[module]: True for module in biased}
    if refusal := _refused(checkpoint, fields):
        return None, refusal
    return StockForm(fields, _zero_biases(checkpoint, even, layers, biased)), "every layer keeps the same sizes"


def _untold(checkpoint: Checkpoint, even: LayerShape) -> str | None:
    """A size that the configuration can't say, and that transformers would take for another than the layers'."""
    family, sizes = checkpoint.family, checkpoint.sizes
    if "intermediate_size" not in family.sizes and even.intermediate_size != sizes["intermediate_size"]:
        return "MLP's width"
    if "head_dim" not in family.sizes and even.num_attention_heads != sizes["num_attention_heads"]:
        return "head size, which is the hidden size by the heads"
    return None


def _zero_biases(
    checkpoint: Checkpoint, even: LayerShape, layers: KeptLayers, biased: list[Module]
) -> dict[str, tuple[int, ...]]:
    family = checkpoint.family
    return {
        f"{family.layer.format(i=written)}.{producer}.bias": (checkpoint.rows(module)[producer].count(even),)
        for source, written in layers.written_index.items()
        for module in biased
        for producer in family.module(module).producers
        if f"{family.layer.format(i=source)}.{producer}.bias" not in checkpoint.tensors
    }


def _gains_bias(checkpoint: Checkpoint, module: Module, adds_bias: bool) -> bool:
    """Whether the module's output projection has a bias that the source's own configuration does not say."""
    flap = checkpoint.flap
    if flap and flap.modules and checkpoint.family.module(module).output in flap.biases:
        return True
    return adds_bias and f"{checkpoint.family.output(0, module)}.bias" not in checkpoint.tensors


def _refused(checkpoint: Checkpoint, fields: dict[str, Any]) -> str | None:
    """What transformers' own configuration class has against the sizes, such as heads that do not divide h."""
    from transformers import AutoConfig

    config = {k: v for k, v in checkpoint.config.items() if k not in ("flap", "auto_map", "model_type")}
    try:
        AutoConfig.for_model(checkpoint.family.name, **config | fields)
    except Exception as error:  # strict dataclasses wrap what their validators raise in classes of their own
        lines = str(error).strip().splitlines() or [first_line(error)]
        return f"transformers refuses the sizes: {lines[-1].strip()}"
    return None
