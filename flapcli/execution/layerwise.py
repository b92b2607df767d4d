"""A model that runs layer by layer: of its decoder layers only the one at hand has weights, or all of them.

The one executor for models bigger than memory: streamed calibration, its backward pass, sequential fits and streamed
perplexity all call `LayerwiseModel.run(layer, step)`. What lies between layers (hidden states, sums) is the caller's.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.architecture.shape import Module
from flapcli.checkpoints import Checkpoint
from flapcli.checkpoints.column_norms import ColumnNorms
from flapcli.errors import FlapError
from flapcli.execution.batches import STREAM, Batches
from flapcli.execution.device import Runtime
from flapcli.execution.loading import empty_model, in_place_of, layers_of
from flapcli.execution.memory import give_back
from flapcli.progress import Advance, Progress

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with besides its hidden states
Norms = dict[Module, ColumnNorms | None]
Weights = dict[str, torch.Tensor]
Forward = Callable[[torch.Tensor], torch.Tensor]  # hidden states (batch, seqlen, hidden) through something
Step = Callable[[slice, Forward], None]  # a batch of windows, and what its hidden states go through
META = torch.device("meta")


@dataclass(frozen=True)
class Layer:
    """One decoder layer with its weights on the device, and norms of its output projections as stored, if asked for."""

    index: int
    module: torch.nn.Module
    norms: Norms


class LayerwiseModel:
    """`windows` (n, seqlen) through the embeddings, any layers in any order, and the head.

    Embeddings, masks and positions are the model's own code's. `model` is one that is in memory with all its weights.
    Raises FlapError where the model can't be built.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: NDArray[np.int64],
        runtime: Runtime,
        progress: Progress,
        model: torch.nn.Module | None = None,
    ) -> None:
        self.checkpoint, self.windows, self.device = checkpoint, windows, runtime.device
        self.runtime, self.progress, self._resident = runtime, progress, model is not None
        self.model = model or empty_model(checkpoint, runtime.dtype, runtime.device)
        self._ends = _Ends(checkpoint, self.model, runtime.device, self._resident)
        self.batches = self._cut()

    def _cut(self, backward: bool = False) -> Batches:
        seqlen, instead = self.windows.shape[1], STREAM if self._resident else ""
        return Batches(seqlen, self.device, self.runtime.batch_size, self.progress, backward, instead)

    def backward_over(self, windows: NDArray[np.int64]) -> "LayerwiseModel":
        """The same model over other windows, in batches as small as passes with a gradient need."""
        other = copy(self)
        other.windows = windows
        other.batches = other._cut(backward=True)
        return other

    def tokens(self, part: slice) -> torch.Tensor:
        """Token ids of a batch, (batch, seqlen) int64."""
        return torch.from_numpy(self.windows[part])

    def embed(self, take: Callable[[slice, torch.Tensor], None], advance: Advance | None = None) -> None:
        """Give `take` the first layer's input, batch by batch; then the embeddings' memory is given back."""
        self.batches.run(len(self.windows), lambda part: take(part, self.embedded(part)), advance)
        self._ends.unload()

    def embedded(self, part: slice) -> torch.Tensor:
        """The first layer's input for a batch, (batch, seqlen, hidden)."""
        return self._ends.embed(self.tokens(part))

    def layers(self, order: Sequence[int], norms: bool = False) -> Iterator[Layer]:
        """Layers in this order, each with weights until the next is asked for, which a thread reads ahead."""
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[tuple[Weights, Norms]] | None = None
            for place, index in enumerate(order):
                ahead = ahead or reader.submit(self._read, index, norms)
                weights, of_outputs = ahead.result()
                ahead = reader.submit(self._read, order[place + 1], norms) if place + 1 < len(order) else None
                module = self._assign(index, weights)
                weights.clear()
                yield Layer(index, module, of_outputs)
                module.to(META)
                give_back()

    def run(self, layer: Layer, step: Step, advance: Advance | None = None) -> None:
        """Call `step` for all windows, batch by batch; it must take effect only when it returns (`Batches.run`)."""

        def of_batch(part: slice) -> None:
            step(part, self.through(layer.index, part, layer.module))

        self.batches.run(len(self.windows), of_batch, advance)

    def through(self, index: int, part: slice, layer: torch.nn.Module | None = None) -> Forward:
        """What a layer, the model's own with weights there or one in its place, makes of a batch's hidden states."""
        module = layer or self.model.get_submodule(self.checkpoint.family.layer.format(i=index))
        args, kwargs = self._ends.arguments(index, self.tokens(part))

        def forward(states: torch.Tensor) -> torch.Tensor:
            output = module(states, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output  # some families return a tuple

        return forward

    def head(self, step: Step, advance: Advance | None = None) -> None:
        """Call `step` for all windows with what makes logits of the last layer's output: final norm and head."""
        self.batches.run(len(self.windows), lambda part: step(part, self.logits), advance)
        self.unload()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What final norm and head make of the last layer's output, (batch, seqlen, vocab_size).

        Their weights are there from the first call on until `unload`.
        """
        self._ends.learn(self.tokens(slice(0, 1)))
        return self._ends.logits(states)

    def unload(self) -> None:
        """Give the memory of embeddings and head back."""
        self._ends.unload()

    def _read(self, index: int, with_norms: bool) -> tuple[Weights, Norms]:
        """A layer's weights by name within it, in the dtype the model runs in; norms are of what is stored."""
        family = self.checkpoint.family
        prefix = f"{family.layer.format(i=index)}."
        dtypes = {name: p.dtype for name, p in self.model.get_submodule(prefix[:-1]).named_parameters()}
        norms: Norms = dict.fromkeys(family.modules)
        outputs = {family.output_weight(index, module): module for module in family.modules}
        weights = {}
        for name in self.checkpoint.tensors:
            if name.startswith(prefix):
                local = name.removeprefix(prefix)
                tensor = self.checkpoint.read(name)
                if with_norms and name in outputs:
                    norms[outputs[name]] = ColumnNorms.of(self.checkpoint.as_matrix(outputs[name], tensor))
                weights[local] = tensor.to(dtypes.get(local, tensor.dtype))
        give_back()
        return weights, norms

    def _assign(self, index: int, weights: Weights) -> torch.nn.Module:
        layer = self.model.get_submodule(self.checkpoint.family.layer.format(i=index))
        try:
            layer.load_state_dict({n: t.to(self.device) for n, t in weights.items()}, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise FlapError(f"{self.checkpoint.name}: layer {index} can't be built: {reason}") from error
        return layer


class _LastLayerReachedError(Exception):
    """The last layer was called: the rest of the decoder is of no interest."""


class _Ends:
    """What comes before the first layer and after the last; learns what the decoder's code calls each layer with."""

    def __init__(self, checkpoint: Checkpoint, model: torch.nn.Module, device: torch.device, resident: bool) -> None:
        self.checkpoint, self.device, self.model, self._resident = checkpoint, device, model, resident
        self.decoder = model.get_submodule(checkpoint.family.decoder)
        self._layers = layers_of(model, checkpoint)
        inside, layers = f"{checkpoint.family.decoder}.", checkpoint.family.layer.split("{i}")[0]
        outside = [name for name in checkpoint.tensors if not name.startswith(layers)]
        self._names = [name for name in outside if name.startswith(inside)]
        self._head_names = [name for name in outside if not name.startswith(inside)]
        self._arguments: dict[int, list[Arguments]] = {}
        self._loaded: list[str] = []
        self._in_tuples = False  # whether the decoder's code takes a layer's output for a tuple; learnt by `embed`

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input of the first layer, (batch, seqlen, hidden), for token ids (batch, seqlen)."""
        self._load(self._names)
        seen: list[tuple[torch.Tensor, Arguments]] = []

        def note(*args: Any, **kwargs: Any) -> torch.Tensor:
            states = args[0] if args else kwargs.pop("hidden_states")
            seen.append((states, (args[1:], kwargs)))
            if len(seen) == len(self._layers):
                raise _LastLayerReachedError
            return states

        with in_place_of(self._layers, note), suppress(_LastLayerReachedError):
            self.decoder(input_ids=ids.to(self.device), use_cache=False)
        self._arguments[len(ids)] = [arguments for _, arguments in seen]
        # What takes a layer's output for a tuple gives the next one the first window of a tensor.
        self._in_tuples = len(seen) > 1 and seen[1][0].ndim < seen[0][0].ndim
        return seen[0][0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What the model's own code makes of the last layer's output, (batch, seqlen, vocab_size)."""
        self._load([*self._names, *self._head_names])
        head = self.model.get_submodule(self.checkpoint.family.head)
        if not self._resident and f"{self.checkpoint.family.head}.weight" not in self._head_names:
            head.weight = self.model.get_input_embeddings().weight  # type: ignore[operator]
        with in_place_of(self._layers, lambda *_, **__: (states, None) if self._in_tuples else states):
            tokens = torch.zeros(states.shape[:-1], dtype=torch.int64, device=states.device)  # whichever
            return self.model(input_ids=tokens, use_cache=False).logits

    def arguments(self, layer: int, ids: torch.Tensor) -> Arguments:
        """What `layer` is called with for a batch of this size; it depends on sizes alone, so it is made once."""
        if len(ids) not in self._arguments:
            self.embed(ids)
            self.unload()
        return self._arguments[len(ids)][layer]

    def learn(self, ids: torch.Tensor) -> None:
        """How the decoder calls its layers, where that is not known yet."""
        if not self._arguments:
            self.arguments(0, ids)

    def _load(self, names: list[str]) -> None:
        if not self._resident and self._loaded != names:
            self._set_each(names, lambda name, empty: self.checkpoint.read(name).to(self.device, empty.dtype))
            self._loaded = names

    def unload(self) -> None:
        """Give the embeddings' and the head's memory back, where they were loaded."""
        if self._resident:
            return
        self._set_each(self._loaded, lambda _, loaded: loaded.to(META))
        if self._loaded:
            self.model.get_submodule(self.checkpoint.family.head).to(META)  # where it was the embedding
        self._loaded = []
        give_back()

    def _set_each(self, names: list[str], value: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Put in every weight's place what `value` makes of its name and of what is there."""
        for name in names:
            parent, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            if (there := getattr(owner, leaf, None)) is None:
                raise FlapError(f"{self.checkpoint.name}: transformers leaves out 1 tensors: {name}")
            setattr(owner, leaf, torch.nn.Parameter(value(name, there), requires_grad=False))
