"""Tries a family's description on a real checkpoint: sizes and tensors by headers, single layers sliced and masked."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from flapcli.architecture.shape import MODULES, LayerShape, ModelShape
from flapcli.artifacts.plan import Plan, StatsRef, build_plan
from flapcli.checkpoints import Checkpoint
from flapcli.execution.device import Runtime
from flapcli.execution.layerwise import Forward, Layer, LayerwiseModel
from flapcli.execution.loading import empty_model
from flapcli.execution.settings import ApplyOptions, Execution
from flapcli.progress import Progress, Silent
from flapcli.pruning.companions import module_layout
from flapcli.pruning.compensation import ClosedForm
from flapcli.pruning.cut import cut_of
from flapcli.pruning.layout import Layout, layout_of, specs_of
from flapcli.pruning.slicing import FitReport, make

WINDOWS, SEQLEN, CLOSE = 2, 16, 1e-3


class Trial(NamedTuple):
    """One layer: the largest difference of sliced and masked outputs, in standard deviations of what the layer adds."""

    layer: int
    difference: float

    @property
    def agrees(self) -> bool:
        return self.difference < CLOSE


def try_description(checkpoint: Checkpoint, execution: Execution, progress: Progress = Silent()) -> list[Trial]:
    """Slice the first and the last layer to about half their units, and compare with the masked ones, in float32.

    Raises FlapError naming all tensors and sizes that the description does not account for.
    """
    shape = checkpoint.shape
    tried = sorted({0, shape.num_layers - 1})
    plan = _plan_of(shape, tried)
    layout = layout_of(checkpoint, plan, ApplyOptions(compensate="none", remote_code="always"), adds_bias=False)
    runtime = Runtime.of(execution, "float32")
    windows = np.random.default_rng(0).integers(0, checkpoint.vocabulary, (WINDOWS, SEQLEN))
    layerwise = LayerwiseModel(checkpoint, windows, runtime, progress)
    sliced = _sliced_model(layout, runtime)
    inputs: list[torch.Tensor] = []
    with torch.inference_mode(), progress.task("check", len(tried), "layers") as advance:
        layerwise.embed(lambda _, states: inputs.append(states.clone()))
        trials = []
        for layer in layerwise.layers(tried):
            trials.append(_compare(layer, layerwise, layout, sliced, torch.cat(inputs)))
            advance(1)
    return trials


def _compare(
    layer: Layer, layerwise: LayerwiseModel, layout: Layout, sliced: torch.nn.Module, states: torch.Tensor
) -> Trial:
    family, tensors = layout.checkpoint.family, _tensors_of(layout, layer.index)
    module = sliced.get_submodule(family.layer.format(i=layer.index))
    module.load_state_dict({name: value.to(states.device) for name, value in tensors.items()}, assign=True)
    small = _output(layerwise, replace(layer, module=module), states)
    for kind in MODULES:
        cut = cut_of(layout.checkpoint, layout.plan, layer.index, kind)
        weight = layer.module.get_submodule(family.module(kind).output).weight
        (weight.T if family.transposed else weight)[:, cut.pruned] = 0  # type: ignore[operator]
    masked = _output(layerwise, layer, states)
    scale = (masked - states).std().clamp_min(torch.finfo(torch.float32).tiny)
    return Trial(layer.index, float((small - masked).abs().max() / scale))


def _output(layerwise: LayerwiseModel, layer: Layer, states: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(states)

    def step(part: slice, forward: Forward) -> None:
        found[part] = forward(states[part])

    layerwise.run(layer, step)
    return found


def _plan_of(shape: ModelShape, layers: list[int]) -> Plan:
    """A plan that keeps every other unit in these layers, groups of query heads alike, and all elsewhere."""

    def kept(layer: int, units: int) -> np.ndarray:
        if layer not in layers or units < 2:
            return np.arange(units)
        groups = shape.layers[layer].num_key_value_heads if units == shape.layers[layer].num_attention_heads else 1
        apart = np.arange(units).reshape(max(groups, 1), -1) if shape.attention_unit else np.arange(units)[None]
        return apart[:, ::2].ravel()

    units = {
        (i, m): kept(i, shape.units(i, m)) if m in shape.prunable else np.arange(shape.units(i, m))
        for i in range(shape.num_layers)
        for m in MODULES
    }
    return build_plan(
        shape, StatsRef(path="", sha256=""), units, 0.5, method="flap", metric="WIFV", structure="AL-AM", settings={}
    )


def _sliced_model(layout: Layout, runtime: Runtime) -> torch.nn.Module:
    """The model in the layout's sizes, all its weights on the meta device."""
    place = layout.checkpoint.family.layer.removesuffix(".{i}")
    flap = {size: [getattr(layer, size) for layer in layout.sizes] for size in LayerShape._fields}
    modules = [module_layout(layout, kind).model_dump(exclude_none=True) for kind in MODULES]
    section = flap | {"modules": modules, "biases": [], "decoder_layers": place}
    return empty_model(layout.checkpoint, runtime.dtype, runtime.device, section)


def _tensors_of(layout: Layout, layer: int) -> dict[str, torch.Tensor]:
    """A layer's tensors as apply would write them, by names within the layer, float32."""
    prefix = f"{layout.checkpoint.family.layer.format(i=layer)}."
    found: dict[str, torch.Tensor] = {}
    for step in layout.steps:
        specs = specs_of(step)
        if specs and specs[0].name.startswith(prefix):
            made = make(step, layout, ClosedForm("none", None, 0.0, False), FitReport())
            found |= {s.name.removeprefix(prefix): t.float() for s, t in zip(specs, made, strict=True)}
    return found
