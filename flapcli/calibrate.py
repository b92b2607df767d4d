"""Stage 1: one dense forward pass over the calibration windows, and what it says of every channel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.device import for_batches
from flapcli.errors import FlapError
from flapcli.loading import load_model
from flapcli.moments import Moments, batch_sums
from flapcli.progress import Progress
from flapcli.shape import MODULES, Module
from flapcli.stats import ModuleStats

Key = tuple[int, Module]


@dataclass
class Measured:
    """Everything a stats file holds besides its header."""

    modules: dict[Key, ModuleStats]
    grams: dict[Key, NDArray[np.float32]] | None


class Recorder:
    """Hooks on the inputs of a decoder's output projections, which gather moments (and Gram sums).

    A batch counts only once `commit` is called, so one that failed half-way leaves no trace. All channels of
    the model are merged as one vector: sixty small merges a batch would cost more than the sums.
    """

    def __init__(self, checkpoint: Checkpoint, model: torch.nn.Module, gram: bool) -> None:
        shape = checkpoint.shape
        self.sizes = {
            (layer, module): shape.units(layer, module) * shape.channels_per_unit(module)
            for layer in range(shape.num_layers)
            for module in MODULES
        }
        self.total: Moments | None = None
        self.grams: dict[Key, torch.Tensor] = {}
        self._batch: dict[Key, torch.Tensor] = {}
        self._tokens = 0
        self._products: dict[Key, torch.Tensor] = {}
        for key, channels in self.sizes.items():
            if channels:
                projection = model.get_submodule(checkpoint.family.output(*key))
                projection.register_forward_pre_hook(self._hook(key, gram))

    def _hook(self, key: Key, gram: bool) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._batch[key] = batch_sums(inputs[0])
            self._tokens = inputs[0].shape[:-1].numel()
            if gram:
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
                self._products[key] = x.T @ x

        return record

    def commit(self) -> None:
        """Take in the last batch. Raises FlapError naming the first layer whose activations are not finite."""
        keys = [key for key, channels in self.sizes.items() if channels]
        sums = torch.cat([self._batch[key].cpu() for key in keys], dim=1)
        if not torch.isfinite(sums).all():
            self._refuse(keys)
        batch = Moments.from_sums(self._tokens, sums)
        if self.total:
            self.total.merge(batch)
        else:
            self.total = batch
        for key, product in self._products.items():
            self.grams[key] = self.grams[key].add_(product) if key in self.grams else product
        self._batch.clear()
        self._products.clear()

    def _refuse(self, keys: list[Key]) -> NoReturn:
        layer, module = next(key for key in keys if not torch.isfinite(self._batch[key]).all())
        raise FlapError(
            f"activations of layer {layer}, {module} are NaN or infinite: try --dtype float32 or bfloat16, "
            "and check that the checkpoint's weights are finite"
        )

    def moments(self) -> dict[Key, Moments]:
        """The moments of every module; of no channels where a module is pruned away."""
        if self.total is None:
            raise ValueError("nothing was recorded")
        return dict(zip(self.sizes, self.total.split(list(self.sizes.values())), strict=True))


def measure(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None,
    gram: bool,
    progress: Progress,
) -> Measured:
    """Run `windows` (nsamples, seqlen) through the dense decoder and return the statistics.

    Accumulators are float64 (Gram sums float32) whatever `dtype` the model runs in.
    Raises FlapError on activations that are not finite and where memory does not suffice.
    """
    model = load_model(checkpoint, dtype, device)
    decoder = model.get_submodule(checkpoint.family.decoder)  # without the lm_head
    recorder = Recorder(checkpoint, model, gram)

    def step(batch: torch.Tensor) -> None:
        decoder(input_ids=batch, use_cache=False)
        recorder.commit()

    with torch.inference_mode():
        for_batches(windows, step, device, batch_size, progress, "calibrate")
    modules = {key: _module_stats(checkpoint, key, moments) for key, moments in recorder.moments().items()}
    tokens = int(windows.size)
    grams = {key: (total / tokens).cpu().numpy() for key, total in recorder.grams.items()}
    return Measured(modules, grams if gram else None)


def _module_stats(checkpoint: Checkpoint, key: Key, moments: Moments) -> ModuleStats:
    """Moments as float32 vectors, with the norms of the output projection's columns beside them."""
    if len(moments.mean) == 0:
        return ModuleStats(*(np.zeros(0, np.float32) for _ in range(5)))
    weight = checkpoint.read(f"{checkpoint.family.output(*key)}.weight").float()
    return ModuleStats(
        mean=moments.mean.float().numpy(),
        variance=moments.variance.float().numpy(),
        square_mean=moments.square_mean.float().numpy(),
        weight_square_sum=weight.square().sum(0, dtype=torch.float64).float().numpy(),
        weight_abs_mean=weight.abs().mean(0, dtype=torch.float64).float().numpy(),
    )
