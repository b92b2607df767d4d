"""Calibration of models bigger than memory: one decoder layer at a time over all windows, saved after each."""

from dataclasses import dataclass

import torch

from flapcli.artifacts.stats_writer import StatsWriter
from flapcli.calibration.brain_surgeon import eliminator
from flapcli.calibration.fisher import loss_gradient
from flapcli.calibration.recorder import Recorder, fisher_of, layer_stats_of
from flapcli.calibration.workload import Workload
from flapcli.execution.hidden_states import HiddenStates
from flapcli.execution.layerwise import Forward, Layer, LayerwiseModel
from flapcli.execution.memory import stay_in_memory
from flapcli.progress import Advance
from flapcli.storage.resume import Resume


def stream(work: Workload, resume: Resume, writer: StatsWriter | None, activation_memory: int) -> None:
    """Write the statistics of the workload's windows layer by layer into `writer`, rank 0's.

    Hidden states take RAM up to `activation_memory` bytes and half of what is free, else files in the resume folder.
    Same statistics as `in_memory.measure`: the same batches go through the same layers. Fisher information takes a pass
    back through them, and hidden states between all layers in files for it. Raises FlapError as that does.
    """
    shape, dtype = work.checkpoint.shape, work.runtime.dtype
    layerwise = LayerwiseModel(work.checkpoint, work.windows, work.runtime, work.progress, backward=work.fisher)
    passes = 2 if work.fisher else 1
    size = (*work.windows.shape, shape.hidden_size)
    in_memory = stay_in_memory(passes * work.windows.size * shape.hidden_size * dtype.itemsize, activation_memory)
    hidden = HiddenStates(size, dtype, in_memory, resume)
    recorder = Recorder(work.checkpoint, layerwise.model, work.gram, work.runtime.device, work.fisher)
    total = work.windows.size * shape.num_layers * passes
    # Tensors of inference mode can't take part in a backward pass.
    mode = torch.no_grad() if work.fisher else torch.inference_mode()
    with mode, work.progress.task("calibrate", total, "tokens x layers") as advance:
        ForwardPass(work, layerwise, hidden, recorder, writer).run(advance)
        if work.fisher:
            gradient = HiddenStates(size, dtype, in_memory, resume, "gradient")
            BackwardPass(work, layerwise, hidden, recorder, writer, gradient).run(advance)


@dataclass
class LayerWalk:
    """A pass over the layers of a streamed calibration; `hidden` holds their inputs, the writer is rank 0's."""

    work: Workload
    layerwise: LayerwiseModel
    hidden: HiddenStates
    recorder: Recorder
    writer: StatsWriter | None

    @property
    def num_layers(self) -> int:
        return self.work.checkpoint.shape.num_layers

    def _done(self, states: HiddenStates) -> tuple[set[int], int]:
        """Layers of which every rank has saved `states`, and how many parts of the statistics rank 0 has written."""
        mine = {"saved": states.saved(), "written": self.writer.parts if self.writer else 0}
        everyone = self.work.ranks.agree(mine)
        return set.intersection(*(set(theirs["saved"]) for theirs in everyone)), everyone[0]["written"]

    def _check(self, _tokens: int = 0) -> None:
        self.work.ranks.check()


class ForwardPass(LayerWalk):
    """Statistics of every layer, whose input is saved for the next run to go on with.

    Where Fisher information is asked for, all layers' inputs and the last one's output stay in files.
    """

    def run(self, advance: Advance) -> None:
        work, start = self.work, self._start()
        advance(start * work.windows.size)
        if start:
            work.progress.note(f"going on with layer {start} of {self.num_layers} (from 0)")
        if start == self.num_layers:
            return
        if self.writer:
            self.writer.rewind(start)
        if start:
            self.hidden.restore(start)
        else:
            self.layerwise.embed(self.hidden.write, self._check)
            self.hidden.save(0) if work.fisher else self.hidden.turn(0)
        for layer in self.layerwise.layers(range(start, self.num_layers), norms=True):
            self._layer(layer.index, layer, advance)
            if work.fisher or layer.index + 1 < self.num_layers:
                self.hidden.save(layer.index + 1)
            found = layer_stats_of(self.recorder, layer.index, layer.norms, work.ranks)
            if self.writer:
                self.writer.write(layer.index, found)
            work.ranks.agree(layer.index)  # from here on no rank can need the input of this layer again
            if not work.fisher:
                self.hidden.forget(layer.index)

    def _start(self) -> int:
        """The last layer whose input every rank has, and before which rank 0 has all statistics; 0 to begin.

        One past the last layer where all is written, and only the file's last rename was not.
        """
        inputs, written = self._done(self.hidden)
        complete = 2 * self.num_layers if self.work.fisher else self.num_layers
        # The way back needs every rank's inputs down to the first layer's, which goes last.
        if written == complete or (written >= self.num_layers and 0 in inputs):
            return self.num_layers
        return max((layer for layer in inputs if layer <= written), default=0)

    def _layer(self, index: int, layer: Layer, advance: Advance) -> None:
        needed = self.work.fisher or index + 1 < self.num_layers

        def step(part: slice, forward: Forward) -> None:
            self.recorder.begin(part)
            states = forward(self.hidden.read(part).to(self.layerwise.device)).cpu()
            self.recorder.commit()
            if needed:
                self.hidden.write(part, states)
            self._check()

        self.layerwise.run(layer, step, advance)


@dataclass
class BackwardPass(LayerWalk):
    """Fisher information: layers last to first, each run again with its gradient.

    Needs the input of every layer, and the last one's output, in the files of `hidden`; removes them. `gradient` holds
    the loss's gradient with respect to a layer's input: that of the last one's output first.
    """

    gradient: HiddenStates

    def run(self, advance: Advance) -> None:
        """Append all layers' Fisher information, with Gram matrices their elimination. Not in inference mode."""
        work, count, start = self.work, self.num_layers, self._start()
        if self.writer:
            self.writer.rewind(2 * count - (count if start is None else start))
        self.recorder.keep_gates_only()
        if start is None:
            start = count
            self._head()
        else:
            work.progress.note(f"going on with the backward pass below layer {start} of {count} (from 0)")
            advance((count - start) * work.windows.size)
            if start:
                self.gradient.restore(start)
        for layer in self.layerwise.layers(range(start)[::-1]):
            self.hidden.restore(layer.index)
            self._layer(layer.index, layer, advance)
            if layer.index:
                self.gradient.save(layer.index)
            found = fisher_of(self.recorder, layer.index, work.ranks)
            if self.writer:
                self.writer.write_fisher(layer.index, found, eliminator(work.checkpoint, work.runtime.device))
            work.ranks.agree(layer.index)  # from here on no rank can need what this layer was run on again
            self.hidden.forget(layer.index)
            self.gradient.forget(layer.index + 1)

    def _start(self) -> int | None:
        """The first layer whose input's gradient every rank has, and from which on rank 0 has written all.

        None to begin; 0 where all is written, and only the file's last rename was not.
        """
        gradients, written = self._done(self.gradient)
        lowest = 2 * self.num_layers - written
        return min((layer for layer in gradients if layer >= lowest), default=None) if lowest else 0

    def _head(self) -> None:
        """From the last layer's output to the loss, and back."""
        device = self.layerwise.device
        self.hidden.restore(self.num_layers)

        def step(part: slice, logits: Forward) -> None:
            states, ids = self.hidden.read(part).to(device), self.layerwise.tokens(part).to(device)
            self.gradient.write(part, loss_gradient(logits, states, ids, self.work.start))

        self.layerwise.head(step, self._check)
        self.gradient.save(self.num_layers)
        self.work.ranks.agree(None)
        self.hidden.forget(self.num_layers)

    def _layer(self, index: int, layer: Layer, advance: Advance) -> None:
        device = self.layerwise.device

        def step(part: slice, forward: Forward) -> None:
            self.recorder.begin(part)
            states = self.hidden.read(part).to(device).detach().requires_grad_()
            with torch.enable_grad():
                output = forward(states)
            output.backward(self.gradient.read(part).to(device))
            gradient = states.grad.cpu() if index and states.grad is not None else None
            self.recorder.commit()  # from here on nothing takes memory: out of it, a batch is taken in again
            if gradient is not None:
                self.gradient.write(part, gradient)
            self._check()

        self.layerwise.run(layer, step, advance)
