"""Stage 1: one dense forward pass over the calibration windows, and what it says of every channel."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.device import for_batches
from flapcli.errors import FlapError
from flapcli.loading import load_model
from flapcli.moments import Moments
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

    A batch counts only once `commit` is called, so one that failed half-way leaves no trace.
    """

    def __init__(self, checkpoint: Checkpoint, model: torch.nn.Module, gram: bool) -> None:
        self.moments: dict[Key, Moments] = {}
        self.grams: dict[Key, torch.Tensor] = {}
        self._batch: dict[Key, tuple[Moments, torch.Tensor | None]] = {}
        shape = checkpoint.shape
        for layer in range(shape.num_layers):
            for module in MODULES:
                key = (layer, module)
                if shape.units(layer, module) == 0:
                    self.moments[key] = Moments(0, torch.zeros(0).double(), torch.zeros(0).double())
                    continue
                projection = model.get_submodule(checkpoint.family.output(layer, module))
                projection.register_forward_pre_hook(self._hook(key, gram))

    def _hook(self, key: Key, gram: bool):  # type: ignore[no-untyped-def]
        def record(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            product = None
            if gram:
                x32 = x.float()
                product = x32.T @ x32
            self._batch[key] = (Moments.of(x), product)

        return record

    def commit(self) -> None:
        """Take in the last batch. Raises FlapError naming the first layer whose activations are not finite."""
        for (layer, module), (moments, _) in self._batch.items():
            if not moments.finite:
                raise FlapError(
                    f"activations of layer {layer}, {module} are NaN or infinite: try --dtype float32 or bfloat16, "
                    "and check that the checkpoint's weights are finite"
                )
        for key, (moments, product) in self._batch.items():
            if key in self.moments:
                self.moments[key].merge(moments)
            else:
                self.moments[key] = moments
            if product is not None:
                self.grams[key] = self.grams[key].add_(product) if key in self.grams else product
        self._batch.clear()


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
    modules = {key: _module_stats(checkpoint, key, moments) for key, moments in recorder.moments.items()}
    grams = {key: (total / recorder.moments[key].count).cpu().numpy() for key, total in recorder.grams.items()}
    return Measured(modules, grams if gram else None)


def _module_stats(checkpoint: Checkpoint, key: Key, moments: Moments) -> ModuleStats:
    """Moments as float32 vectors, with the norms of the output projection's columns beside them."""
    if moments.count == 0:
        return ModuleStats(*(np.zeros(0, np.float32) for _ in range(5)))
    weight = checkpoint.read(f"{checkpoint.family.output(*key)}.weight").float()
    return ModuleStats(
        mean=moments.mean.float().numpy(),
        variance=moments.variance.float().numpy(),
        square_mean=moments.square_mean.float().numpy(),
        weight_square_sum=weight.square().sum(0, dtype=torch.float64).float().numpy(),
        weight_abs_mean=weight.abs().mean(0, dtype=torch.float64).float().numpy(),
    )
