"""A plan beside its model: whether the two belong together, and the sizes that layers have once it is applied."""

from pathlib import Path

import numpy as np

from flapcli.architecture.shape import LayerShape, ModelShape
from flapcli.artifacts.plan import Plan
from flapcli.errors import FlapError


def check_belongs(plan: Plan, shape: ModelShape, where: Path) -> None:
    """Raise FlapError unless the plan was made for this model and its units are the model's."""
    if plan.model.fingerprint != shape.fingerprint:
        raise FlapError(
            f"{where} was made for {plan.model.name} ({plan.model.fingerprint[:12]}), which {shape.name} "
            f"({shape.fingerprint[:12]}) is not: give its --model, or calibrate and plan anew"
        )
    if len(plan.layers) != shape.num_layers:
        raise FlapError(f"{where} has {len(plan.layers)} layers, {shape.name} has {shape.num_layers}")
    wrong = [
        f"layer {i}, {m}: {part.of} {part.unit}, expected {shape.units(i, m)} {shape.unit(m)}"
        for i, layer in enumerate(plan.layers)
        for m in shape.modules
        if ((part := layer.module(m)).of, part.unit) != (shape.units(i, m), shape.unit(m))
    ]
    wrong += [f"layer {i}, attention: {told}" for i in range(shape.num_layers) if (told := _uneven(plan, shape, i))]
    wrong += [f"layer {i}, experts: {told}" for i in range(shape.num_layers) if (told := _unlike(plan, shape, i))]
    wrong += [
        f"layer {i}, {m}: all its units stay or none, since {why}"
        for m, why in (shape.whole or {}).items()
        for i in range(shape.num_layers)
        if len(plan.kept(i, m)) not in (0, shape.units(i, m))
    ]
    if wrong:
        raise FlapError(f"{where} does not fit {shape.name}: {'; '.join(wrong[:4])}")


def _uneven(plan: Plan, shape: ModelShape, layer: int) -> str | None:
    """What is wrong where single query heads stay in unequal numbers in the groups that share keys and values."""
    groups = shape.layers[layer].num_key_value_heads
    if shape.attention_unit != "query_head" or groups < 2:
        return None
    stays = shape.kept(layer, "attention", plan.kept(layer, "attention"))["num_attention_heads"]
    counts = stays.reshape(groups, -1).sum(axis=1)
    return f"{', '.join(map(str, counts))} query heads stay in its groups, which need equally many" * (
        len({*counts}) > 1
    )


def _unlike(plan: Plan, shape: ModelShape, layer: int) -> str | None:
    """What is wrong where experts of a layer keep unlike numbers of neurons, or one that must stay keeps none."""
    count = shape.layers[layer].num_experts
    if not count or not len(units := plan.kept(layer, "experts")):
        return None
    neurons = shape.kept(layer, "experts", units)["expert_size"].reshape(count, -1).sum(axis=1)
    if len({*neurons} - {0}) > 1:
        return f"they keep {', '.join(map(str, neurons))} neurons, and those that stay need equally many"
    why = shape.every_expert if 0 in neurons else None
    return f"expert {int(np.argmin(neurons))} can't go: {why}" if why else None


def pruned_layers(plan: Plan, shape: ModelShape) -> tuple[LayerShape, ...]:
    """Sizes of every layer, as it is written, once the plan is applied."""

    def after(layer: int) -> LayerShape:
        stays = ((module, shape.written(layer, module, plan.kept(layer, module))) for module in shape.modules)
        kept = [shape.sizes_of(layer, module, units) for module, units in stays]
        return LayerShape(**{size: count for found in kept for size, count in found.items()})

    return tuple(after(layer) for layer in range(shape.num_layers))
