"""A causal model in two parts: its decoder, heard after chosen layers, and its head, which takes a few tokens."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from flapcli.checkpoints import Checkpoint
from flapcli.execution.head import head_of


class Forward:
    """`layers` are indices of the decoder layers whose output is wanted too."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, layers: Sequence[int] = ()) -> None:
        self.decoder = model.get_submodule(checkpoint.family.decoder)
        self.head = head_of(model, self.decoder)
        self.device = next(p.device for p in model.parameters() if not p.is_meta)
        self._layers, self._heard = layers, dict.fromkeys(layers, torch.empty(0))
        for index in layers:
            layer = model.get_submodule(checkpoint.family.layer.format(i=index))
            layer.register_forward_hook(lambda _module, _inputs, output, index=index: self._hear(index, output))

    def _hear(self, index: int, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self._heard[index] = output[0] if isinstance(output, tuple) else output

    def states(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the head reads, (batch, seqlen, hidden), for token ids (batch, seqlen); and the layers' outputs."""
        states = self.decoder(input_ids=ids.to(self.device), use_cache=False)[0]
        return states, [self._heard[index] for index in self._layers]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 logits (n, vocabulary) of states (n, hidden)."""
        return self.head(rows[None])[0].float()
