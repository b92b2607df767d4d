"""Stage 1 for models bigger than memory: one decoder layer at a time over all windows, saved after each."""

from typing import Any

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
from flapcli.reverse import Reverse
from flapcli.shape import MODULES, Module
from flapcli.stats import StatsWriter
from flapcli.walk import Walk


class Streaming(Walk):
    """The forward pass: statistics of every layer, whose input is saved for the next run to go on with.

    Where Fisher information is asked for, all layers' inputs and the last one's output stay in files.
    """

    def run(self, advance: Advance) -> None:
        start, count = self._start(), self.checkpoint.shape.num_layers
        advance(start * self.windows.size)
        if start:
            self.progress.note(f"going on with layer {start} of {count} (from 0)")
        if start == count:
            return
        if self.writer:
            self.writer.rewind(start)
        if start == 0:
            self._embed()
        else:
            self.hidden.restore(start)
        for index, layer, norms in Layers(self.checkpoint, self.model, self.device, norms=True).from_(start):
            self._layer(index, layer, advance)
            if self.recorder.fisher or index + 1 < count:
                self.hidden.save(index + 1)
            self._write(index, norms)
            self.ranks.agree(index)  # from here on no rank can need the input of this layer again
            if not self.recorder.fisher:
                self.hidden.forget(index)

    def _start(self) -> int:
        """The last layer whose input every rank has, and before which rank 0 has all statistics; 0 to begin.

        One past the last layer where all is written, and only the file's last rename was not.
        """
        mine = {"inputs": self.hidden.saved(), "written": self.writer.parts if self.writer else 0}
        everyone = self.ranks.agree(mine)
        written = everyone[0]["written"]
        count = self.checkpoint.shape.num_layers
        complete = 2 * count if self.recorder.fisher else count
        # The way back needs every rank's inputs down to the first layer's, which goes last.
        if written == complete or (written >= count and all(0 in theirs["inputs"] for theirs in everyone)):
            return count
        shared = set.intersection(*(set(theirs["inputs"]) for theirs in everyone))
        return max((layer for layer in shared if layer <= written), default=0)

    def _embed(self) -> None:
        def step(part: slice) -> None:
            self.hidden.write(part, self.front.run(self.tokens(part)))

        self.batches.run(len(self.windows), step, lambda _tokens: self.ranks.check())
        self.front.unload()
        self.hidden.save(0) if self.recorder.fisher else self.hidden.turn(0)

    def _layer(self, index: int, layer: torch.nn.Module, advance: Advance) -> None:
        last = index + 1 == self.checkpoint.shape.num_layers

        def step(part: slice) -> None:
            self.recorder.abandon()
            args, kwargs = self.front.call(index, self.tokens(part))
            states = states_of(layer(self.hidden.read(part).to(self.device), *args, **kwargs)).cpu()
            self.recorder.commit()
            if self.recorder.fisher or not last:
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
    with_fisher: bool = False,
) -> None:
    """Write the statistics of `windows` (nsamples, seqlen) layer by layer into `writer`, rank 0's.

    Hidden states take RAM up to `activation_memory` bytes, else files in the resume folder. Same statistics as
    `calibrate.measure`: the same batches go through the same layers. `with_fisher` goes back through them, and
    keeps the hidden states between all layers in files for it. Raises FlapError as that does.
    """
    model = empty_model(checkpoint, dtype, device)
    passes = 2 if with_fisher else 1
    size = (len(windows), windows.shape[1], checkpoint.shape.hidden_size)
    in_memory = passes * windows.size * checkpoint.shape.hidden_size * dtype.itemsize <= activation_memory
    parts: dict[str, Any] = {
        "checkpoint": checkpoint,
        "windows": windows,
        "device": device,
        "hidden": HiddenStates(size, dtype, in_memory, resume),
        "front": Front(checkpoint, model, device),
        "recorder": Recorder(checkpoint, model, gram, device, with_fisher),
        "batches": Batches(windows.shape[1], device, batch_size, progress, backward=with_fisher),
        "ranks": ranks,
        "writer": writer,
        "model": model,
        "progress": progress,
    }
    total = windows.size * checkpoint.shape.num_layers * passes
    # Tensors of inference mode can't take part in a backward pass.
    mode = torch.no_grad() if with_fisher else torch.inference_mode()
    with mode, progress.task("calibrate", total, "tokens x layers") as advance:
        Streaming(**parts).run(advance)
        if with_fisher:
            Reverse(**parts, gradient=HiddenStates(size, dtype, in_memory, resume, "gradient")).run(advance)
