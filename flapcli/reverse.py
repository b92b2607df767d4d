"""The backward pass of a streamed calibration: layers last to first, each run again with its gradient."""

from dataclasses import dataclass

import torch

from flapcli.elimination import eliminator
from flapcli.fisher import loss_gradient
from flapcli.hidden import HiddenStates
from flapcli.layers import Layers, states_of
from flapcli.progress import Advance
from flapcli.recording import fisher
from flapcli.walk import Walk


@dataclass
class Reverse(Walk):
    """Needs the input of every layer, and the last one's output, in the files of `hidden`; removes them.

    `gradient` holds the loss's gradient with respect to a layer's input: that of the last one's output first.
    """

    gradient: HiddenStates

    def run(self, advance: Advance) -> None:
        """Append all layers' Fisher information, with Gram matrices their elimination, last layer first.

        Not in inference mode.
        """
        count, start = self.checkpoint.shape.num_layers, self._start()
        if self.writer:
            self.writer.rewind(2 * count - (count if start is None else start))
        self.recorder.keep_gates_only()
        if start is None:
            start = count
            self._head()
        else:
            self.progress.note(f"going on with the backward pass below layer {start} of {count} (from 0)")
            advance((count - start) * self.windows.size)
            if start:
                self.gradient.restore(start)
        for index, layer, _ in Layers(self.checkpoint, self.model, self.device).over(range(start)[::-1]):
            self.hidden.restore(index)
            self._layer(index, layer, advance)
            if index:
                self.gradient.save(index)
            found = fisher(self.recorder, index, self.ranks)
            if self.writer:
                self.writer.write_fisher(index, found, eliminator(self.checkpoint))
            self.ranks.agree(index)  # from here on no rank can need what this layer was run on again
            self.hidden.forget(index)
            self.gradient.forget(index + 1)

    def _start(self) -> int | None:
        """The first layer whose input's gradient every rank has, and from which on rank 0 has written all.

        None to begin; 0 where all is written, and only the file's last rename was not.
        """
        mine = {"gradients": self.gradient.saved(), "written": self.writer.parts if self.writer else 0}
        everyone = self.ranks.agree(mine)
        lowest = 2 * self.checkpoint.shape.num_layers - everyone[0]["written"]
        if lowest == 0:
            return 0
        shared = set.intersection(*(set(theirs["gradients"]) for theirs in everyone))
        return min((layer for layer in shared if layer >= lowest), default=None)

    def _head(self) -> None:
        """From the last layer's output to the loss, and back."""
        count = self.checkpoint.shape.num_layers
        self.hidden.restore(count)

        def step(part: slice) -> None:
            states, ids = self.hidden.read(part).to(self.device), self.tokens(part).to(self.device)
            self.gradient.write(part, loss_gradient(self.front.logits, states, ids))

        self.batches.run(len(self.windows), step, lambda _tokens: self.ranks.check())
        self.front.unload()
        self.gradient.save(count)
        self.ranks.agree(None)
        self.hidden.forget(count)

    def _layer(self, index: int, layer: torch.nn.Module, advance: Advance) -> None:
        def step(part: slice) -> None:
            self.recorder.abandon()
            args, kwargs = self.front.call(index, self.tokens(part))
            states = self.hidden.read(part).to(self.device).detach().requires_grad_()
            with torch.enable_grad():
                output = states_of(layer(states, *args, **kwargs))
            output.backward(self.gradient.read(part).to(self.device))
            gradient = states.grad.cpu() if index and states.grad is not None else None
            self.recorder.commit()  # from here on nothing takes memory: out of it, a batch is taken in again
            if gradient is not None:
                self.gradient.write(part, gradient)
            self.ranks.check()

        self.batches.run(len(self.windows), step, advance)
