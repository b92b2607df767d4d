"""What both ways of calibrating share: hooks that gather moments, and the statistics made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.errors import FlapError
from flapcli.fisher import gate_gradients
from flapcli.influence import watch
from flapcli.moments import Moments, batch_sums
from flapcli.ranks import Ranks
from flapcli.shape import MODULES, Module
from flapcli.stats import Influence, ModuleStats

ROWS = 128
# Of a layer's modules; of its residual stream, whose channels are the numbers of `Influence`; or of the gates on a
# module's units, whose channels are their gradients.
Key = tuple[int, Module | Literal["residual", "attention.fisher", "mlp.fisher"]]
GATES: dict[Module, Literal["attention.fisher", "mlp.fisher"]] = {
    "attention": "attention.fisher", "mlp": "mlp.fisher",
}  # fmt: skip


class NotFiniteError(FlapError):
    """Activations that are NaN or infinite: trying again gives the same."""


@dataclass(frozen=True)
class Norms:
    """Of an output projection's weight columns: sum of squares and mean of magnitudes, float32 (channels,)."""

    square_sum: NDArray[np.float32]
    abs_mean: NDArray[np.float32]

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Norms":
        """From the weight (out, channels) as stored; sums in float64, some rows at a time."""
        squares = torch.zeros(weight.shape[1], dtype=torch.float64)
        magnitudes = torch.zeros_like(squares)
        for rows in weight.split(ROWS):
            part = rows.float()
            squares += part.square().sum(0, dtype=torch.float64)
            magnitudes += part.abs().sum(0, dtype=torch.float64)
        return cls(squares.float().numpy(), (magnitudes / len(weight)).float().numpy())


class Recorder:
    """Hooks on the inputs of a decoder's output projections, which gather moments (and Gram sums), and on its layers.

    With `fisher`, backward passes gather the moments of gates' gradients. A batch counts only once `commit` is
    called, so one that failed half-way leaves no trace. What was taken out is recorded no more.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: torch.nn.Module, gram: bool, device: torch.device, fisher: bool = False
    ) -> None:
        self.gram, self.device, self.fisher = gram, device, fisher
        self.moments: dict[Key, Moments] = {}
        self.grams: dict[Key, torch.Tensor] = {}
        self._batch: dict[Key, torch.Tensor] = {}
        self._products: dict[Key, torch.Tensor] = {}
        self._tokens = 0
        shape, family = checkpoint.shape, checkpoint.family
        for layer in range(shape.num_layers):
            block = model.get_submodule(family.layer.format(i=layer))
            self.moments[layer, "residual"] = Moments.none(len(Influence._fields))
            watch(block, family.middle, partial(self._sum, (layer, "residual")))
            for module in MODULES:
                key: Key = (layer, module)
                channels = shape.units(layer, module) * shape.channels_per_unit(module)
                self.moments[key] = Moments.none(channels)
                if fisher:
                    self.moments[layer, GATES[module]] = Moments.none(shape.units(layer, module))
                if channels:
                    projection = model.get_submodule(family.output(layer, module))
                    projection.register_forward_pre_hook(self._hook(layer, module, shape.channels_per_unit(module)))

    def _hook(
        self, layer: int, module: Module, channels: int
    ) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        key: Key = (layer, module)

        @torch.no_grad()
        def record(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            self._sum(key, x)
            if self.gram and key in self.moments:
                x32 = x.float()
                self._products[key] = x32.T @ x32
            if self.fisher and inputs[0].requires_grad:
                inputs[0].register_hook(
                    lambda gradient: self._sum((layer, GATES[module]), gate_gradients(x, gradient, channels))
                )

        return record

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
        for key, product in self._products.items():
            known = self.grams.get(key)
            self.grams[key] = product if known is None else known.to(product.device).add_(product)
        self.abandon()

    def take(self, key: Key) -> tuple[Moments, torch.Tensor | None]:
        """A module's moments and Gram sum (None where none is kept), which leave the recorder."""
        moments = self.moments.pop(key)
        if not self.gram or not len(moments.mean) or key[1] not in MODULES:
            return moments, None
        total = self.grams.pop(key, None)
        return moments, torch.zeros(2 * moments.mean.shape, device=self.device) if total is None else total

    def abandon(self) -> None:
        """Forget a batch that failed half-way."""
        self._batch.clear()
        self._products.clear()


def module_stats(moments: Moments, norms: Norms | None) -> ModuleStats:
    """Moments as float32 vectors, the norms of the output projection's columns beside them."""
    if norms is None:
        return ModuleStats(*(np.zeros(0, np.float32) for _ in range(5)))
    return ModuleStats(
        mean=moments.mean.float().numpy(),
        variance=moments.variance.float().numpy(),
        square_mean=moments.square_mean.float().numpy(),
        weight_square_sum=norms.square_sum,
        weight_abs_mean=norms.abs_mean,
    )


def complete(
    recorder: Recorder, key: tuple[int, Module], norms: Norms | None, ranks: Ranks
) -> tuple[ModuleStats, NDArray[np.float32] | None]:
    """A module's statistics over all ranks, and its Gram matrix where one is kept; of use on rank 0 alone."""
    mine, total = recorder.take(key)
    moments = ranks.merged(mine)
    gram = None
    if total is not None:
        gram = ranks.summed(total).div_(max(moments.count, 1)).cpu().numpy()
    return module_stats(moments, norms), gram


def influence(recorder: Recorder, layer: int, ranks: Ranks) -> Influence:
    """A layer's block influence over all ranks; of use on rank 0 alone."""
    mine, _ = recorder.take((layer, "residual"))
    return Influence(*ranks.merged(mine).mean.float().tolist())


def fisher(recorder: Recorder, layer: int, ranks: Ranks) -> dict[Module, NDArray[np.float32]]:
    """Fisher information of a layer's units over all ranks, float32 (units,); of use on rank 0 alone."""
    return {
        module: ranks.merged(recorder.take((layer, GATES[module]))[0]).square_mean.float().numpy() for module in MODULES
    }
