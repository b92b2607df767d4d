"""What the dense model predicts, kept to hold another model's predictions of the same windows against."""

import math
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.artifacts.eval_report import Divergence
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.execution.device import Runtime
from flapcli.execution.divergence import Likeliest, divergence
from flapcli.execution.head import TOKENS, cached_rows, predicting
from flapcli.execution.hidden_states import ResidualStream
from flapcli.execution.layerwise import LayerwiseModel
from flapcli.progress import Silent
from flapcli.storage.atomic import explain
from flapcli.storage.resume import Resume


class Beside(Protocol):
    """What sees a model's windows as its losses are read, batch by batch."""

    def take(self, part: slice, states: torch.Tensor, logits: torch.Tensor) -> None:
        """A batch's last layer's output, (batch, seqlen, hidden_size), and logits; must take effect at its end."""

    def end(self) -> Divergence | None:
        """All windows were taken: what is known of them."""


class Reference:
    """The dense model's predictions of `windows` (n, seqlen), without its layers: the output of the last one is kept.

    Its head, read anew from the checkpoint, makes the very logits of it again. So two models are never in memory at
    once, nor the logits of all windows. States stand in RAM or, where that is short, in `files`.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: NDArray[np.int64], runtime: Runtime, files: Resume, name: str
    ) -> None:
        self.name, self.windows, self._files = checkpoint.name, windows, files
        self._states = ResidualStream.of(checkpoint, windows, runtime, files, name, at_once=1)
        self._layerwise = LayerwiseModel(checkpoint, windows, runtime, Silent())

    def take(self, part: slice, states: torch.Tensor, logits: torch.Tensor) -> None:
        try:
            self._states.write(part, states)
        except OSError as error:
            raise explain(error, self._files.folder) from error

    def end(self) -> None:
        self._states.turn()

    def logits(self, part: slice) -> torch.Tensor:
        """Of a batch of windows, (batch, seqlen, vocab_size); the head stays on the device until `unload`."""
        return self._layerwise.logits(self._states.read(part))

    def unload(self) -> None:
        self._layerwise.unload()


class Comparison:
    """How far predictions of the same windows are from the reference's: of their tokens from `start` on."""

    def __init__(self, reference: Reference, start: int) -> None:
        self._reference, self._start = reference, start
        self._divergences = np.empty(len(reference.windows))  # a window's mean, in nats a token
        self._equal = np.empty(len(reference.windows))  # a window's share

    def take(self, part: slice, states: torch.Tensor, logits: torch.Tensor) -> None:
        """The reference's logits are made for as many windows as the model's, and so to the bit as they were."""
        dense = self._reference.logits(part)
        for place, window in enumerate(range(part.start, part.stop)):
            theirs, ours = (predicting(each[place : place + 1], self._start) for each in (dense, logits))
            parts = [_compared(theirs[rows], ours[rows]) for rows in cached_rows(ours, TOKENS)]
            self._divergences[window], self._equal[window] = torch.cat(parts).cpu().double().mean(0).tolist()

    def end(self) -> Divergence:
        """Raises FlapError where a divergence is not finite."""
        self._reference.unload()
        if not np.isfinite(self._divergences).all():
            raise FlapError("the divergence from the dense model is not finite; try float32 (--dtype)")
        count = len(self._divergences)
        error = float(self._divergences.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        return Divergence(kl=self._divergences.mean(), standard_error=error, equal_tokens=self._equal.mean())


def _compared(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Divergence from their logits (n, vocabulary), and whether the likeliest token is the same, (n, 2) float32."""
    theirs, ours = theirs.float(), ours.float()
    equal = theirs.argmax(-1) == ours.argmax(-1)
    return torch.stack([divergence(ours, Likeliest.of(theirs)), equal.float()], -1)


class References:
    """The dense model's predictions of each text. Within, files may lie beside the runtime's scratch."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._of: dict[str, Reference] = {}
        self._files = Resume(runtime.scratch.with_name(f"{runtime.scratch.name}.dense"), "dense")

    def __enter__(self) -> Self:
        self._files.discard()  # what a kill left
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._of.clear()
        self._files.discard()

    def beside(self, text: str, checkpoint: Checkpoint, windows: NDArray[np.int64], start: int) -> Beside:
        """What is to see a model's windows of a text: the first model's are kept, others are held against them.

        Raises FlapError where these are other windows.
        """
        if text not in self._of:
            name = f"dense-{len(self._of)}"
            self._of[text] = Reference(checkpoint, windows, self._runtime, self._files, name)
            return self._of[text]
        reference = self._of[text]
        if not np.array_equal(windows, reference.windows):
            raise FlapError(
                f"--divergence: the tokenizers of {reference.name} and {checkpoint.name} make other tokens of {text}: "
                "leave it out"
            )
        return Comparison(reference, start)
