"""Tries a family's description on a real checkpoint: sizes and tensors by headers, single layers sliced and masked."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from flapcli.architecture.shape import LayerShape, ModelShape, Module
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
    for kind in (m for m in family.modules if not layout.checkpoint.lacks(layer.index, m)):
        cut, description = cut_of(layout.checkpoint, layout.plan, layer.index, kind), family.module(kind)
        weight = layer.module.get_parameter(description.weight(description.output)).detach()
        if kind == "experts":
            for expert, _, pruned in cut.experts:
                (weight[expert].T if description.transposed else weight[expert])[:, pruned] = 0
            continue
        (weight.T if family.transposed else weight)[:, cut.pruned] = 0
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

    def kept(layer: int, module: Module) -> np.ndarray:
        units = np.arange(shape.units(layer, module))
        if layer not in layers or module not in shape.prunable or not len(units):
            return units
        return units.reshape(shape.groups(layer, module), -1)[:, ::2].ravel()

    units = {(i, m): kept(i, m) for i in range(shape.num_layers) for m in shape.modules}
    return build_plan(
        shape, StatsRef(path="", sha256=""), units, 0.5, method="flap", metric="WIFV", structure="AL-AM", settings={}
    )


def _sliced_model(layout: Layout, runtime: Runtime) -> torch.nn.Module:
    """The model in the layout's sizes, all its weights on the meta device."""
    place = layout.checkpoint.family.layer.removesuffix(".{i}")
    flap = {size: [getattr(layer, size) for layer in layout.sizes] for size in LayerShape._fields}
    modules = [module_layout(layout, m).model_dump(exclude_none=True) for m in layout.checkpoint.family.modules]
    section = flap | {"modules": modules, "biases": [], "decoder_layers": place}
    return empty_model(layout.checkpoint, runtime.dtype, runtime.device, section)


def _tensors_of(layout: Layout, layer: int) -> dict[str, torch.Tensor]:
    """A layer's tensors as apply would write them, by names within the layer, float32."""
    prefix = f"{layout.checkpoint.family.layer.format(i=layer)}."
    found: dict[str, torch.Tensor] = {}
    for step in layout.steps:
        names = [layout.checkpoint.own_name(spec.name) for spec in specs_of(step)]
        if names and names[0].startswith(prefix):
            made = make(step, layout, ClosedForm("none", None, 0.0, False), FitReport())
            found |= {name.removeprefix(prefix): t.float() for name, t in zip(names, made, strict=True)}
    return found
