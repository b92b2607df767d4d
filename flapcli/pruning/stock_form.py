"""Whether a pruned folder can be a stock checkpoint of its family, which every runtime loads.

It can where every layer keeps the same sizes and the family's own configuration can say which projections
have biases (those that it would add beside compensation's are written as zeros).
"""

from dataclasses import dataclass
from typing import Any

from flapcli.architecture.family import PER_LAYER
from flapcli.architecture.rows import evaluate
from flapcli.architecture.shape import LayerShape, Module
from flapcli.checkpoints import Checkpoint
from flapcli.errors import first_line
from flapcli.pruning.kept_layers import KeptLayers

GROUPED = 8  # bfloat16 numbers of the 16 bytes that rows of grouped matrix products begin at
MODULE_OF: dict[str, Module] = {
    "num_attention_heads": "attention", "num_key_value_heads": "attention", "intermediate_size": "mlp",
    "shared_expert_size": "shared_expert", "num_experts": "experts", "expert_size": "experts",
}  # fmt: skip
SAID_AS = {
    "intermediate_size": "MLP's width", "shared_expert_size": "shared expert's width",
    "num_experts": "number of experts", "expert_size": "experts' width",
}  # fmt: skip


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
    found = {size: _values(checkpoint, size, sizes, layers) for size in LayerShape._fields}
    if any(len(values) > 1 for values in found.values()):
        return None, "layers keep different sizes"
    even = {size: values.pop() for size, values in found.items() if values}
    if 0 in even.values():
        return None, "modules are pruned away whole"
    biased = [module for module in family.modules if gains_bias(checkpoint, module, adds_bias)]
    unsaid = [family.module(module).output for module in biased if module not in family.bias_options]
    if unsaid:
        return None, f"{family.architecture} knows no bias on {' and '.join(unsaid)}"
    if family.attention.head_arguments and even["num_attention_heads"] != checkpoint.sizes["num_attention_heads"]:
        return None, f"{family.architecture} gives every head a slope by its number, which those that stay would change"
    wanted = even | {"head_dim": checkpoint.shape.head_dim}
    keys = {size: key for size, key in family.sizes.items() if isinstance(key, str) and "*" not in key}
    fields: dict[str, Any] = {checkpoint.key_of(key): wanted[size] for size, key in keys.items() if size in wanted}
    if told := _untold(checkpoint, even, fields):
        return None, told
    fields |= {
        key: evaluate(told, checkpoint.values(told) | even)
        for key, told in family.follow.items()
        if checkpoint.setting(key)
    }
    fields |= layers.config_fields | {family.bias_options[module]: True for module in biased}
    if refusal := _refused(checkpoint, fields):
        return None, refusal
    return StockForm(fields, _zero_biases(checkpoint, even, layers, biased)), "every layer keeps the same sizes"


def _values(checkpoint: Checkpoint, size: str, sizes: tuple[LayerShape, ...], layers: KeptLayers) -> set[int]:
    """A size of all written layers that have its module."""
    module = MODULE_OF[size]
    if module not in checkpoint.family.modules:
        return set()
    written = zip(layers.source_indices, sizes, strict=True)
    return {getattr(layer, size) for source, layer in written if not checkpoint.lacks(source, module)}


def _untold(checkpoint: Checkpoint, even: dict[str, int], fields: dict[str, Any]) -> str | None:
    """Why the configuration can't say a size, or transformers would take it for another than the layers'."""
    family, sizes = checkpoint.family, checkpoint.sizes
    for size, value in even.items():
        product = str(family.sizes.get(size, ""))
        dense = sizes.get(size) or max(getattr(layer, size) for layer in checkpoint.shape.layers)
        if "*" in product:
            is_said = evaluate(product, checkpoint.values(product) | fields) == value
        else:
            is_said = size in family.sizes or value == dense
        if size in SAID_AS and not is_said:
            return f"config.json of {family.architecture} has no key for its {SAID_AS[size]}"
    if "head_dim" not in family.sizes and even["num_attention_heads"] != sizes["num_attention_heads"]:
        return (
            f"config.json of {family.architecture} has no key for its head size, which is the hidden size by the heads"
        )
    if even.get("expert_size", 0) % GROUPED:
        return f"grouped matrix products take experts of widths in multiples of {GROUPED} (--round-to {GROUPED})"
    return None


def _zero_biases(
    checkpoint: Checkpoint, even: dict[str, int], layers: KeptLayers, biased: list[Module]
) -> dict[str, tuple[int, ...]]:
    family, layer = checkpoint.family, LayerShape(0, 0, 0)._replace(**even)
    return {
        f"{family.layer.format(i=written)}.{producer}.bias": (checkpoint.rows(module)[producer].count(layer),)
        for source, written in layers.written_index.items()
        for module in biased
        for producer in family.module(module).producers
        if f"{family.layer.format(i=source)}.{producer}.bias" not in checkpoint.tensors
        and not checkpoint.lacks(source, module)
    }


def gains_bias(checkpoint: Checkpoint, module: Module, adds_bias: bool) -> bool:
    """Whether the module's output projection has a bias that the source's own configuration does not say."""
    flap, having = checkpoint.flap, [i for i in range(checkpoint.shape.num_layers) if not checkpoint.lacks(i, module)]
    if module == "experts" or not having:
        return False
    if flap and flap.modules and checkpoint.family.module(module).output in flap.biases:
        return True
    return adds_bias and f"{checkpoint.family.output(having[0], module)}.bias" not in checkpoint.tensors


def _refused(checkpoint: Checkpoint, fields: dict[str, Any]) -> str | None:
    """What transformers' own configuration class has against the sizes, such as heads that do not divide h."""
    from transformers import AutoConfig

    config = {k: v for k, v in checkpoint.config.items() if k not in ("flap", "auto_map", "model_type", *PER_LAYER)}
    try:
        AutoConfig.for_model(checkpoint.family.name, **config | fields)
    except Exception as error:  # strict dataclasses wrap what their validators raise in classes of their own
        lines = str(error).strip().splitlines() or [first_line(error)]
        return f"transformers refuses the sizes: {lines[-1].strip()}"
    return None
