"""Windows cut into batches, which shrink where memory runs out."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from flapcli.errors import FlapError
from flapcli.progress import Advance, Progress

CPU_TOKENS, GPU_TOKENS = 1024, 16384  # a batch's tokens: past these, larger batches gain nothing
STREAM = "--stream, "  # is advised where a whole model is in memory
BACKWARD = 4  # the share of them that passes with a gradient take, which hold all layers' activations


class Batches:
    """Cuts windows into batches, smaller ones from where memory ran out on. None as batch size chooses one.

    `instead` (STREAM) begins what is advised where one window is too much.
    """

    def __init__(
        self,
        seqlen: int,
        device: torch.device,
        batch_size: int | None,
        progress: Progress,
        backward: bool = False,
        instead: str = "",
    ) -> None:
        self.seqlen, self.device, self.progress, self.instead = seqlen, device, progress, instead
        self.fixed = batch_size is not None
        tokens = (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // (BACKWARD if backward else 1)
        self.size = batch_size or max(1, tokens // seqlen)

    def run(self, count: int, step: Callable[[slice], None], advance: Advance | None = None, done: int = 0) -> None:
        """Call `step` on the slices of `count` windows, in order, from window `done` on; `advance` gets its tokens.

        `step` must take effect only when it returns: a batch that ran out of memory is cut in halves and tried
        again. Raises FlapError where the batch size was the user's, or one window is too much.
        """
        while done < count:
            part = slice(done, min(done + self.size, count))
            try:
                step(part)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._shrink(error)
                continue
            done = part.stop
            if advance:
                advance((part.stop - part.start) * self.seqlen)

    def _shrink(self, error: BaseException) -> None:
        if self.fixed or self.size == 1:
            hint = (
                "lower --batch-size" if self.size > 1 else f"use {self.instead}a smaller --seqlen or another --device"
            )
            raise FlapError(f"out of memory on {self.device} with batches of {self.size} windows: {hint}") from error
        self.size //= 2
        self.progress.note(f"out of memory on {self.device}: going on with batches of {self.size} windows")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Within:
    """An `Advance` of batches that moves within each too, as layer after layer is through.

    A large model's batch takes minutes. What a batch that ran out of memory had told is made good by the next one.
    `states` is what the layer that ran last put out, (batch, seqlen, hidden_size).
    """

    states: torch.Tensor

    def __init__(self, layers: Sequence[torch.nn.Module], advance: Advance) -> None:
        self.advance, self.parts, self.ahead = advance, len(layers), 0
        self._hooks = [layer.register_forward_hook(self._through) for layer in layers]

    def __call__(self, tokens: int) -> None:
        self.advance(tokens - self.ahead)
        self.ahead = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _through(self, _layer: torch.nn.Module, _given: object, output: Any) -> None:
        self.states = output[0] if isinstance(output, tuple) else output
        share = self.states.shape[:-1].numel() // self.parts
        self.ahead += share
        self.advance(share)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in ("out of memory", "can't allocate memory", "not enough memory"))
