"""Calibration of models bigger than memory: one decoder layer at a time over all windows, saved after each."""

from dataclasses import dataclass

import torch

from flapcli.artifacts.stats_writer import StatsWriter
from flapcli.calibration.brain_surgeon import eliminator
from flapcli.calibration.fisher import Sample, gradient_before, loss_gradient
from flapcli.calibration.recorder import Recorder, fisher_of, layer_stats_of
from flapcli.calibration.workload import Workload
from flapcli.execution.hidden_states import HiddenStates
from flapcli.execution.layerwise import Forward, Layer, LayerwiseModel
from flapcli.execution.memory import stay_in_memory
from flapcli.progress import Advance
from flapcli.storage.resume import Resume

Part = tuple[slice, torch.Tensor]  # of hidden states: which windows, and what they are


def stream(work: Workload, resume: Resume, writer: StatsWriter | None, activation_memory: int) -> None:
    """Write the statistics of the workload's windows layer by layer into `writer`, rank 0's.

    Hidden states take RAM up to `activation_memory` bytes and half of what is free, else files in the resume folder.
    Same statistics as `in_memory.measure`: the same batches go through the same layers. Fisher information takes a pass
    back through them, and its windows' hidden states between all layers in files for it. Raises FlapError as that does.
    """
    shape, dtype, sample = work.checkpoint.shape, work.runtime.dtype, work.fisher
    layerwise = LayerwiseModel(work.checkpoint, work.windows, work.runtime, work.progress)
    counts = [len(work.windows), *([len(sample.places)] * 2 if sample else [])]
    rows = (work.windows.shape[1], shape.hidden_size)
    in_memory = stay_in_memory(sum(counts) * rows[0] * rows[1] * dtype.itemsize, activation_memory)
    hidden, *back = (
        HiddenStates((count, *rows), dtype, in_memory, resume, name, work.runtime.device)
        for count, name in zip(counts, ("hidden", "kept", "gradient"), strict=False)
    )
    recorder = Recorder(work.checkpoint, layerwise.model, work.gram, work.runtime.device, sample is not None)
    total = (work.windows.size + (sample.numbers.numel() if sample else 0)) * shape.num_layers
    # Tensors of inference mode can't take part in a backward pass.
    mode = torch.no_grad() if sample else torch.inference_mode()
    with mode, work.progress.task("calibrate", total, "tokens x layers") as advance:
        kept = Kept(sample, back[0]) if sample else None
        ForwardPass(work, layerwise, recorder, writer, hidden, kept).run(advance)
        if sample:
            BackwardPass(work, layerwise, recorder, writer, sample, *back).run(advance)


@dataclass
class LayerWalk:
    """A pass over the layers of a streamed calibration; the writer is rank 0's."""

    work: Workload
    layerwise: LayerwiseModel
    recorder: Recorder
    writer: StatsWriter | None

    @property
    def num_layers(self) -> int:
        return self.work.checkpoint.shape.num_layers

    def _done(self, saved: list[int]) -> tuple[set[int], int]:
        """Layers that every rank has saved of, and how many parts of the statistics rank 0 has written."""
        mine = {"saved": saved, "written": self.writer.parts if self.writer else 0}
        everyone = self.work.ranks.agree(mine)
        return set.intersection(*(set(theirs["saved"]) for theirs in everyone)), everyone[0]["written"]

    def _check(self, _tokens: int = 0) -> None:
        self.work.ranks.check()


@dataclass
class Kept:
    """The inputs of all layers, and the last one's output, of the windows that Fisher information is made of."""

    sample: Sample
    states: HiddenStates

    def of(self, part: slice, states: torch.Tensor) -> Part | None:
        """What is needed of a batch, a copy, and where it goes in `states`; None where nothing is."""
        within = self.sample.within(part)
        return (within, states[self.sample.places[within] - part.start]) if within.start < within.stop else None


@dataclass
class ForwardPass(LayerWalk):
    """Statistics of every layer, whose input, in `hidden`, is saved for the next run to go on with."""

    hidden: HiddenStates
    kept: Kept | None

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
            self.layerwise.embed(lambda part, states: self._write(part, states, self._kept(part, states)), self._check)
            self.hidden.turn(0)
            if self.kept:
                self.kept.states.save(0)
        for layer in self.layerwise.layers(range(start, self.num_layers), norms=True):
            self._layer(layer, advance)
            if layer.index + 1 < self.num_layers:
                self.hidden.save(layer.index + 1)
            if self.kept:
                self.kept.states.save(layer.index + 1)
            found = layer_stats_of(self.recorder, layer.index, layer.norms, work.ranks)
            if self.writer:
                self.writer.write(layer.index, found)
            work.ranks.agree(layer.index)  # from here on no rank can need the input of this layer again
            self.hidden.forget(layer.index)

    def _start(self) -> int:
        """The last layer whose input every rank has, and before which rank 0 has all statistics; 0 to begin.

        One past the last layer where all is written, and only the file's last rename was not.
        """
        saved, kept = self.hidden.saved(), self.kept.states.saved() if self.kept else []
        if self.kept:
            saved = [layer for layer in saved if set(range(layer + 1)) <= set(kept)]
        inputs, written = self._done(saved)
        complete = 2 * self.num_layers if self.kept else self.num_layers
        # The way back needs every rank's inputs down to the first layer's, which goes last.
        if written == complete or (self.kept and 0 in self._done(kept)[0] and written >= self.num_layers):
            return self.num_layers
        return max((layer for layer in inputs if layer <= written), default=0)

    def _layer(self, layer: Layer, advance: Advance) -> None:
        needed = self.kept or layer.index + 1 < self.num_layers

        def step(part: slice, forward: Forward) -> None:
            self.recorder.begin(part)
            states = forward(self.hidden.read(part)).to(self.hidden.dtype)
            kept = self._kept(part, states)
            self.recorder.commit()  # from here on nothing takes memory: out of it, a batch is taken in again
            if needed:
                self._write(part, states, kept)
            self._check()

        self.layerwise.run(layer, step, advance)

    def _kept(self, part: slice, states: torch.Tensor) -> Part | None:
        return self.kept.of(part, states) if self.kept else None

    def _write(self, part: slice, states: torch.Tensor, kept: Part | None) -> None:
        self.hidden.write(part, states)
        if self.kept and kept:
            self.kept.states.write(*kept)


@dataclass
class BackwardPass(LayerWalk):
    """Fisher information: layers last to first, each run again with its gradient.

    Needs the input of every layer, and the last one's output, in the files of `kept`; removes them. `gradient` holds
    the loss's gradient with respect to a layer's input: that of the last one's output first.
    """

    sample: Sample
    kept: HiddenStates
    gradient: HiddenStates

    def __post_init__(self) -> None:
        self.layerwise = self.layerwise.backward_over(self.work.windows[self.sample.places])

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
            advance((count - start) * self.layerwise.windows.size)
            if start:
                self.gradient.restore(start)
        for layer in self.layerwise.layers(range(start)[::-1]):
            self.kept.restore(layer.index)
            self._layer(layer, advance)
            if layer.index:
                self.gradient.save(layer.index)
            found = fisher_of(self.recorder, layer.index, work.ranks)
            if self.writer:
                self.writer.write_fisher(layer.index, found, eliminator(work.checkpoint, work.runtime.device))
            work.ranks.agree(layer.index)  # from here on no rank can need what this layer was run on again
            self.kept.forget(layer.index)
            self.gradient.forget(layer.index + 1)

    def _start(self) -> int | None:
        """The first layer whose input's gradient every rank has, and from which on rank 0 has written all.

        None to begin; 0 where all is written, and only the file's last rename was not.
        """
        gradients, written = self._done(self.gradient.saved())
        lowest = 2 * self.num_layers - written
        return min((layer for layer in gradients if layer >= lowest), default=None) if lowest else 0

    def _head(self) -> None:
        """From the last layer's output to the loss, and back."""
        sample = self.sample
        self.kept.restore(self.num_layers)

        def step(part: slice, logits: Forward) -> None:
            gradient = loss_gradient(logits, self.kept.read(part), sample.numbers[part], sample.start)
            self.gradient.write(part, gradient)

        self.layerwise.head(step, self._check)
        self.gradient.save(self.num_layers)
        self.work.ranks.agree(None)
        self.kept.forget(self.num_layers)

    def _layer(self, layer: Layer, advance: Advance) -> None:
        def step(part: slice, forward: Forward) -> None:
            self.recorder.begin(part)
            gradient = gradient_before(forward, self.kept.read(part), self.gradient.read(part)).to(self.gradient.dtype)
            self.recorder.commit()  # from here on nothing takes memory, as in the forward pass
            if layer.index:
                self.gradient.write(part, gradient)
            self._check()

        self.layerwise.run(layer, step, advance)
