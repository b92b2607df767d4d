"""Stage 1 for models bigger than memory: one decoder layer at a time over all windows, saved after each."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.device import Batches
from flapcli.hidden import HiddenStates
from flapcli.layers import Front, Layers, states_of
from flapcli.loading import empty_model
from flapcli.progress import Advance, Progress
from flapcli.ranks import Ranks
from flapcli.recording import Norms, Recorder, complete, influence
from flapcli.resume import Resume
from flapcli.shape import MODULES, Module
from flapcli.stats import StatsWriter


@dataclass
class Streaming:
    """One streamed calibration of this rank's `windows` (n, seqlen); the writer is rank 0's."""

    checkpoint: Checkpoint
    windows: NDArray[np.int64]
    device: torch.device
    hidden: HiddenStates
    front: Front
    recorder: Recorder
    batches: Batches
    ranks: Ranks
    writer: StatsWriter | None
    model: torch.nn.Module
    progress: Progress

    def run(self, advance: Advance) -> None:
        start, count = self._start(), self.checkpoint.shape.num_layers
        advance(start * self.windows.size)
        if self.writer:
            self.writer.rewind(start)
        if start:
            self.progress.note(f"going on with layer {start} of {count} (from 0)")
        if start == 0:
            self._embed()
        elif start < count:
            self.hidden.restore(start)
        for index, layer, norms in Layers(self.checkpoint, self.model, self.device).from_(start):
            self._layer(index, layer, advance)
            if index + 1 < count:
                self.hidden.save(index + 1)
            self._write(index, norms)
            self.ranks.agree(index)  # from here on no rank can need the input of this layer again
            self.hidden.forget(index)

    def _start(self) -> int:
        """The last layer whose input every rank has, and before which rank 0 has all statistics; 0 to begin.

        One past the last layer where all is written, and only the file's last rename was not.
        """
        mine = {"inputs": self.hidden.saved(), "written": self.writer.parts if self.writer else 0}
        everyone = self.ranks.agree(mine)
        written = everyone[0]["written"]
        if written == self.checkpoint.shape.num_layers:
            return written
        shared = set.intersection(*(set(theirs["inputs"]) for theirs in everyone))
        return max((layer for layer in shared if layer <= written), default=0)

    def _tokens(self, part: slice) -> torch.Tensor:
        return torch.from_numpy(self.windows[part])

    def _embed(self) -> None:
        def step(part: slice) -> None:
            self.hidden.write(part, self.front.run(self._tokens(part)))

        self.batches.run(len(self.windows), step, lambda _tokens: self.ranks.check())
        self.front.unload()
        self.hidden.turn(0)

    def _layer(self, index: int, layer: torch.nn.Module, advance: Advance) -> None:
        last = index + 1 == self.checkpoint.shape.num_layers

        def step(part: slice) -> None:
            self.recorder.abandon()
            args, kwargs = self.front.call(index, self._tokens(part))
            states = states_of(layer(self.hidden.read(part).to(self.device), *args, **kwargs)).cpu()
            self.recorder.commit()
            if not last:
                self.hidden.write(part, states)
            self.ranks.check()

        self.batches.run(len(self.windows), step, advance)

    def _write(self, index: int, norms: dict[Module, Norms | None]) -> None:
        """Merge the layer over ranks and append it to the statistics."""
        modules, grams = {}, {}
        turned = influence(self.recorder, index, self.ranks)
        for module in MODULES:
            modules[module], gram = complete(self.recorder, (index, module), norms[module], self.ranks)
            if gram is not None:
                grams[module] = gram
        if self.writer:
            self.writer.write(index, modules, turned, grams)


def stream(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None,
    gram: bool,
    progress: Progress,
    resume: Resume,
    writer: StatsWriter | None,
    ranks: Ranks,
    activation_memory: int,
) -> None:
    """Write the statistics of `windows` (nsamples, seqlen) layer by layer into `writer`, rank 0's.

    Hidden states take RAM up to `activation_memory` bytes, else files in the resume folder. Same statistics as
    `calibrate.measure`: the same batches go through the same layers. Raises FlapError as that does.
    """
    model = empty_model(checkpoint, dtype, device)
    size = (*windows.shape, checkpoint.shape.hidden_size)
    in_memory = windows.size * checkpoint.shape.hidden_size * dtype.itemsize <= activation_memory
    run = Streaming(
        checkpoint=checkpoint,
        windows=windows,
        device=device,
        hidden=HiddenStates((size[0], size[1], size[2]), dtype, in_memory, resume),
        front=Front(checkpoint, model, device),
        recorder=Recorder(checkpoint, model, gram, device),
        batches=Batches(windows.shape[1], device, batch_size, progress),
        ranks=ranks,
        writer=writer,
        model=model,
        progress=progress,
    )
    layers = checkpoint.shape.num_layers
    with torch.inference_mode(), progress.task("calibrate", windows.size * layers, "tokens x layers") as advance:
        run.run(advance)
