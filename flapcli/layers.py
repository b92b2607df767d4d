"""A model of which one decoder layer at a time has weights; embeddings, masks and positions are its own code's."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from flapcli.checkpoint.base import Checkpoint
from flapcli.errors import FlapError
from flapcli.memory import give_back
from flapcli.recording import Norms
from flapcli.shape import MODULES, Module

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with besides its hidden states
Weights = dict[str, torch.Tensor]
META = torch.device("meta")


class _Reached(Exception):
    """The last layer was called: the rest of the decoder is of no interest."""


class Front:
    """What comes before the first layer and after the last; learns what the decoder's code calls each layer with."""

    def __init__(self, checkpoint: Checkpoint, model: torch.nn.Module, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.decoder = model.get_submodule(checkpoint.family.decoder)
        self.model, self.count = model, checkpoint.shape.num_layers
        self._calls: dict[int, list[Call]] = {}
        self._loaded = False
        self._head: torch.Tensor | None = None

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """Input of the first layer, (batch, seqlen, hidden), for token ids (batch, seqlen)."""
        self._load()
        seen: list[tuple[torch.Tensor, Call]] = []
        with self._listening(seen), suppress(_Reached):
            self.decoder(input_ids=ids.to(self.device), use_cache=False)
        self._calls[len(ids)] = [call for _, call in seen]
        return seen[0][0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What comes after the last layer: final norm and head, (batch, seqlen, vocab_size)."""
        self._load()
        family = self.checkpoint.family
        if self._head is None:
            name = f"{family.head}.weight"
            embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
            own = name in self.checkpoint.tensors
            self._head = self.checkpoint.read(name).to(self.device, embedding.dtype) if own else embedding
        return torch.nn.functional.linear(self.model.get_submodule(family.final_norm)(states), self._head)

    def call(self, layer: int, ids: torch.Tensor) -> Call:
        """What `layer` is called with for a batch of this size; it depends on sizes alone, so it is made once."""
        if len(ids) not in self._calls:
            self.run(ids)
            self.unload()
        return self._calls[len(ids)][layer]

    @contextmanager
    def _listening(self, seen: list[tuple[torch.Tensor, Call]]) -> Iterator[None]:
        """Layers that note their arguments and pass hidden states on as they are."""
        layers = [self.model.get_submodule(self.checkpoint.family.layer.format(i=i)) for i in range(self.count)]

        def note(*args: Any, **kwargs: Any) -> torch.Tensor:
            states = args[0] if args else kwargs.pop("hidden_states")
            seen.append((states, (args[1:], kwargs)))
            if len(seen) == self.count:
                raise _Reached
            return states

        for layer in layers:
            layer.forward = note
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _load(self) -> None:
        if self._loaded:
            return
        start, layers = f"{self.checkpoint.family.decoder}.", self.checkpoint.family.layer.split("{i}")[0]
        for name in self.checkpoint.tensors:
            if name.startswith(start) and not name.startswith(layers):
                parent, _, leaf = name.rpartition(".")
                owner = self.model.get_submodule(parent)
                value = self.checkpoint.read(name).to(self.device, getattr(owner, leaf).dtype)
                setattr(owner, leaf, torch.nn.Parameter(value, requires_grad=False))
        self._loaded = True

    def unload(self) -> None:
        """Give the embeddings' and the head's memory back."""
        layers = self.checkpoint.family.layer.split("{i}")[0].rstrip(".")
        layers = layers.removeprefix(f"{self.checkpoint.family.decoder}.")
        for name, parameter in list(self.decoder.named_parameters()):
            if not name.startswith(f"{layers}.") and not parameter.is_meta:
                parent, _, leaf = name.rpartition(".")
                empty = torch.nn.Parameter(parameter.to(META), requires_grad=False)
                setattr(self.decoder.get_submodule(parent), leaf, empty)
        self._loaded, self._head = False, None
        give_back()


class Layers:
    """Layers in order, each with its weights for the time it is used; the next one is read ahead by a thread."""

    def __init__(
        self, checkpoint: Checkpoint, model: torch.nn.Module, device: torch.device, norms: bool = False
    ) -> None:
        self.checkpoint, self.model, self.device, self.norms = checkpoint, model, device, norms

    def from_(self, start: int) -> Iterator[tuple[int, torch.nn.Module, dict[Module, Norms | None]]]:
        """All layers from `start` on, as `over` gives them."""
        return self.over(range(start, self.checkpoint.shape.num_layers))

    def over(self, order: Sequence[int]) -> Iterator[tuple[int, torch.nn.Module, dict[Module, Norms | None]]]:
        """Index, module with weights on the device, and norms of its output projections if asked for, in this order."""
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[tuple[Weights, dict[Module, Norms | None]]] | None = None
            for place, index in enumerate(order):
                ahead = ahead or reader.submit(self._read, index)
                weights, norms = ahead.result()
                ahead = reader.submit(self._read, order[place + 1]) if place + 1 < len(order) else None
                layer = self._assign(index, weights)
                weights.clear()
                yield index, layer, norms
                layer.to(META)
                give_back()

    def _read(self, index: int) -> tuple[Weights, dict[Module, Norms | None]]:
        """A layer's weights by name within it, in the dtype the model runs in; norms are of what is stored."""
        family = self.checkpoint.family
        prefix = f"{family.layer.format(i=index)}."
        dtypes = {name: p.dtype for name, p in self.model.get_submodule(prefix[:-1]).named_parameters()}
        norms: dict[Module, Norms | None] = dict.fromkeys(MODULES)
        outputs = {f"{family.module(module).output}.weight": module for module in MODULES}
        weights = {}
        for name in self.checkpoint.tensors:
            if name.startswith(prefix):
                local = name.removeprefix(prefix)
                tensor = self.checkpoint.read(name)
                if self.norms and local in outputs:
                    norms[outputs[local]] = Norms.of(tensor)
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


def states_of(output: Any) -> torch.Tensor:
    """A layer's hidden states; some families return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
