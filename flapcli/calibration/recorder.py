"""What both ways of calibrating share: hooks that gather moments, and the statistics made of them."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.architecture.shape import MODULES, Module
from flapcli.artifacts.stats import Influence, ModuleStats
from flapcli.artifacts.stats_writer import LayerStats
from flapcli.calibration.block_influence import observe_layer
from flapcli.calibration.fisher import gate_gradients
from flapcli.calibration.moments import Moments, batch_sums
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.checkpoints.column_norms import ColumnNorms
from flapcli.errors import FlapError
from flapcli.execution.ranks import Ranks

# Of a layer's modules; of its residual stream, whose channels are the numbers of `Influence`; or of the gates on a
# module's units, whose channels are their gradients.
Key = tuple[int, Module | Literal["residual", "attention.fisher", "mlp.fisher"]]
GATES: dict[Module, Literal["attention.fisher", "mlp.fisher"]] = {
    "attention": "attention.fisher", "mlp": "mlp.fisher",
}  # fmt: skip


class NotFiniteError(FlapError):
    """Activations that are NaN or infinite: trying again gives the same."""


class Recorder:
    """Hooks on the inputs of a decoder's output projections, which gather moments (and Gram sums), and on its layers.

    With `fisher`, backward passes gather the moments of gates' gradients. A batch, which `begin` names, counts only
    once `commit` is called. Gram sums alone have it at once, since a second copy of them all would be the peak of
    memory: those that a batch reached before it failed pass over its windows when they come again. What was taken out
    is recorded no more.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: torch.nn.Module, gram: bool, device: torch.device, fisher: bool = False
    ) -> None:
        self.gram, self.device, self.fisher = gram, device, fisher
        self.moments: dict[Key, Moments] = {}
        self.grams: dict[Key, torch.Tensor] = {}
        self._batch: dict[Key, torch.Tensor] = {}
        self._summed: dict[Key, int] = {}  # windows that a Gram sum has
        self._tokens, self._stop = 0, 0
        shape, family = checkpoint.shape, checkpoint.family
        for layer in range(shape.num_layers):
            block = model.get_submodule(family.layer.format(i=layer))
            self.moments[layer, "residual"] = Moments.none(len(Influence._fields))
            observe_layer(block, family, partial(self._sum, (layer, "residual")))
            for module in MODULES:
                key: Key = (layer, module)
                channels = shape.channels(layer, module)
                self.moments[key] = Moments.none(channels)
                if fisher:
                    self.moments[layer, GATES[module]] = Moments.none(shape.units(layer, module))
                if channels:
                    record = partial(self._record, layer, module, shape.channels_per_unit(module))
                    model.get_submodule(family.output(layer, module)).register_forward_pre_hook(record)

    @torch.no_grad()
    def _record(self, layer: int, module: Module, channels: int, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Take in what goes into an output projection, of whose units each has so many channels."""
        key: Key = (layer, module)
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        self._sum(key, x)
        if self.gram and key in self.moments and self._summed.get(key, 0) < self._stop:
            self._add_product(key, x.float())
        if self.fisher and inputs[0].requires_grad:
            gate: Key = (layer, GATES[module])
            inputs[0].register_hook(lambda gradient: self._sum(gate, gate_gradients(x, gradient, channels)))

    def _add_product(self, key: Key, x: torch.Tensor) -> None:
        total = self.grams.get(key)
        self.grams[key] = x.T @ x if total is None else total.to(x.device).addmm_(x.T, x)
        self._summed[key] = self._stop

    def begin(self, windows: slice) -> None:
        """Of the batch that comes: its windows. One that failed half-way is forgotten."""
        self._batch.clear()
        self._stop = windows.stop

    def keep_gates_only(self) -> None:
        """Record nothing but gates from here on."""
        self.moments = {key: moments for key, moments in self.moments.items() if key[1] in GATES.values()}

    def _sum(self, key: Key, values: torch.Tensor) -> None:
        if key not in self.moments:
            return
        self._batch[key] = batch_sums(values)
        self._tokens = len(values)

    def commit(self) -> None:
        """Take in the last batch. Raises NotFiniteError naming the first layer with such activations.

        What all modules share is done for their channels side by side: small operations for each would cost
        more than the sums.
        """
        if not self._batch:
            return
        keys = list(self._batch)
        sums = torch.cat([self._batch[key].cpu() for key in keys], dim=1)
        if not torch.isfinite(sums).all():
            layer, module = next(key for key in keys if not torch.isfinite(self._batch[key]).all())
            name, _, gates = module.partition(".")
            raise NotFiniteError(
                f"{'gradients' if gates else 'activations'} of layer {layer}, {name} are NaN or infinite: "
                "try --dtype float32 or bfloat16, and check that the checkpoint's weights are finite"
            )
        parts = Moments.from_sums(self._tokens, sums).split([self._batch[key].shape[1] for key in keys])
        for key, part in zip(keys, parts, strict=True):
            self.moments[key].merge(part)
        self._batch.clear()

    def take(self, key: Key) -> tuple[Moments, torch.Tensor | None]:
        """A module's moments and Gram sum (None where none is kept), which leave the recorder."""
        moments = self.moments.pop(key)
        if not self.gram or not len(moments.mean) or key[1] not in MODULES:
            return moments, None
        total = self.grams.pop(key, None)
        return moments, torch.zeros(2 * moments.mean.shape, device=self.device) if total is None else total


def layer_stats_of(
    recorder: Recorder, layer: int, norms: Mapping[Module, ColumnNorms | None], ranks: Ranks
) -> LayerStats:
    """All but a layer's Fisher information, over all ranks, which leaves the recorder; of use on rank 0 alone."""
    influence = Influence(*recorder.take((layer, "residual"))[0].over(ranks).mean.float().tolist())
    modules, grams = {}, {}
    for module in MODULES:
        mine, total = recorder.take((layer, module))
        moments = mine.over(ranks)
        if total is not None:
            grams[module] = ranks.summed(total).div_(max(moments.count, 1)).cpu().numpy()
        modules[module] = _module_stats(moments, norms[module])
    return LayerStats(influence, modules, grams)


def _module_stats(moments: Moments, norms: ColumnNorms | None) -> ModuleStats:
    """Moments as float32 vectors, the norms of the output projection's columns beside them."""
    if norms is None:
        return ModuleStats(*(np.zeros(0, np.float32) for _ in range(5)))
    vectors = (moments.mean, moments.variance, moments.square_mean)
    mean, variance, square_mean = (values.float().numpy() for values in vectors)
    return ModuleStats(mean, variance, square_mean, norms.square_sum, norms.abs_mean)


def fisher_of(recorder: Recorder, layer: int, ranks: Ranks) -> dict[Module, NDArray[np.float32]]:
    """Fisher information of a layer's units over all ranks, float32 (units,); of use on rank 0 alone."""
    gates = {module: recorder.take((layer, GATES[module]))[0].over(ranks) for module in MODULES}
    return {module: moments.square_mean.float().numpy() for module, moments in gates.items()}
