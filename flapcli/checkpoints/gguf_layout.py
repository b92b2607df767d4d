"""How an architecture of llama.cpp lays out a checkpoint's tensors: names, and rows of ours in its order."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.gguf_form import GgufForm
from flapcli.architecture.rope import rope_of, rotated
from flapcli.architecture.shape import MODULES, LayerShape, Module
from flapcli.checkpoints.checkpoint import Checkpoint

Rows = NDArray[np.int64]


class Piece(NamedTuple):
    """Rows of one of our projections, in its order; None stands for all of them as they are."""

    source: str
    rows: Rows | None


class GgufLayout:
    """Of a checkpoint in one form; what stands before `.weight` and `.bias` is a tensor's prefix.

    Nothing here asks for the checkpoint's shape, which it may be part of finding out.
    """

    def __init__(self, checkpoint: Checkpoint, form: GgufForm) -> None:
        self.checkpoint, self.form, self.family = checkpoint, form, checkpoint.family

    @cached_property
    def layers(self) -> tuple[LayerShape, ...]:
        return self.family.read_layers(self.checkpoint.sizes, self.checkpoint.flap)

    @cached_property
    def rotated(self) -> int:
        """Channels of a head that are rotated."""
        return rotated(rope_of(self.checkpoint.load_config().to_dict()), self.checkpoint.sizes["head_dim"])

    @cached_property
    def names(self) -> dict[str, str]:
        """llama.cpp's prefix of each of ours, and of each projection that takes the place of some."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.form.architecture)
        table, family = get_tensor_name_map(arch, len(self.layers)), self.family
        units = [name.rpartition(".")[0] for module in MODULES for name in family.module(module).unit_tensors]
        parts = [*family.untouched_in_layer, *units, *(part for module in MODULES for part in self.parts(module))]
        given = {
            f"{family.layer.format(i=i)}.{part}": self.form.names.get(part, "").format(i=i)
            for i in range(len(self.layers))
            for part in parts
        }
        given |= {part: self.form.names.get(part, "") for part in family.outside_layers}
        return {ours: found for ours, name in given.items() if (found := name or table.get_name(ours))}

    def parts(self, module: Module) -> dict[str, list[str]]:
        """The form's projections of a module, below a layer's prefix, and which of ours each is made of."""
        description = self.family.module(module)
        made = {part: origins for part, origins in self.form.parts.items() if _of(origins[0]) in description.producers}
        taken = {_of(origin) for origins in made.values() for origin in origins}
        whole = [part for part in (*description.producers, description.output) if part not in taken]
        return {part: [part] for part in whole} | made

    def pieces(self, module: Module, part: str, layer: LayerShape) -> list[Piece]:
        """What a projection of the form is made of in a layer of these sizes."""
        rows, found = self.checkpoint.rows(module), []
        for origin in self.parts(module)[part]:
            source, _, symbol = origin.partition("#")
            taken = rows[source].split(layer._asdict())[int(symbol)] if symbol else None
            if part in self.form.permuted:
                taken = np.arange(rows[source].count(layer)) if taken is None else taken
                taken = taken[self._interleaved(len(taken))]
            found.append(Piece(source, taken))
        return found

    def _interleaved(self, count: int) -> Rows:
        """Rows of heads with the two rotary halves of each in turns, as llama.cpp's `normal` rotation reads them."""
        head = np.arange(self.checkpoint.sizes["head_dim"])
        head[: self.rotated] = head[: self.rotated].reshape(2, -1).T.ravel()
        return (np.arange(0, count, len(head))[:, None] + head).ravel()

    def is_plus_one(self, name: str) -> bool:
        """Whether a tensor of ours, by its full name, is stored plus one."""
        return any(f".{name}".endswith(f".{part}.weight") for part in self.form.plus_one)

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor of ours, by its full name, is stored (in, out)."""
        return self.family.transposed and name.endswith(".weight") and name.removesuffix(".weight") in self.targets

    @cached_property
    def targets(self) -> dict[str, list[tuple[str, str, list[Piece]]]]:
        """By our projections' prefixes: those that begin with rows of theirs, as (prefix, part, pieces)."""
        found: dict[str, list[tuple[str, str, list[Piece]]]] = {}
        for i, layer in enumerate(self.layers):
            prefix = self.family.layer.format(i=i)
            for module in MODULES:
                for part in self.parts(module):
                    pieces = [Piece(f"{prefix}.{p.source}", p.rows) for p in self.pieces(module, part, layer)]
                    for piece in pieces:
                        found.setdefault(piece.source, [])
                    found[pieces[0].source].append((f"{prefix}.{part}", part, pieces))
        return found


def _of(origin: str) -> str:
    return origin.partition("#")[0]
