"""How llama.cpp has a family: its architectures as data, what they call and do in another way than transformers."""

from collections.abc import Callable
from typing import Any

from pydantic import Field

from flapcli.storage.record import Record

# Metadata's keys of our sizes, and those that stand for the same in nearly every architecture.
SIZES = {
    "num_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}  # fmt: skip
USUAL = {"context_length": "max_position_embeddings", "rope.freq_base": "rope_theta"}
NO_FORM = "flap knows no architecture of llama.cpp with per-layer sizes for it"


class GgufForm(Record):
    """An architecture of llama.cpp that computes what the family computes, and how its tensors follow from ours.

    `read`: flap reads files of it too. `per_layer`: it has sizes layer by layer; else all layers must be alike, and
    have all of their heads where not `fewer_heads`. `output_biases`: it adds biases of output projections.
    `rope_factors`: it rotates whole heads, and divides frequencies by rope_freqs.weight; else it may rotate the first
    rows of a head alone. `requires` maps keys of config.json to the values for which the two compute the same (null:
    there is none; `=KEY`: that of another key), `cycles` its lists of an entry for each layer to what they repeat.

    `parts` gives a projection that it has in place of ours by those whose rows it takes in turn, `PROJECTION#1` being
    the second symbol alone of that one's description. `permuted` are its projections whose rotated rows it wants
    interleaved, `plus_one` our norms that it stores plus one, `scaled` ours that it has no factor for: settings and
    the powers of them that are multiplied in, those after `tied:` only where head and embedding are one matrix.
    `names` are of tensors that the gguf package does not know by ours. `config` maps its metadata's keys, below the
    architecture's name, to those of config.json, or to a number, beside those of USUAL and SIZES; `rotary` is the
    latter's key for the share of a head that is rotated.
    """

    architecture: str
    read: bool = True
    per_layer: bool = False
    fewer_heads: bool = True
    output_biases: bool = False
    rope_factors: bool = False
    requires: dict[str, list[str | bool | int | float | None]] = Field(default_factory=dict)
    cycles: dict[str, list[str | int]] = Field(default_factory=dict)
    parts: dict[str, list[str]] = Field(default_factory=dict)
    permuted: list[str] = Field(default_factory=list)
    plus_one: list[str] = Field(default_factory=list)
    scaled: dict[str, dict[str, float]] = Field(default_factory=dict)
    names: dict[str, str] = Field(default_factory=dict)
    config: dict[str, str | float] = Field(default_factory=dict)
    rotary: str | None = None

    def unmet(self, setting: Callable[[str], Any]) -> str | None:
        """What of `requires` a configuration does not meet, None where it meets all."""
        for key, values in self.requires.items():
            allowed = [setting(v[1:]) if isinstance(v, str) and v.startswith("=") else v for v in values]
            if (found := setting(key)) not in allowed:
                known = " or ".join(map(str, allowed))
                return f"{key} is {found!s:.60}, and llama.cpp's {self.architecture} knows only {known}"
        for key, cycle in self.cycles.items():
            found = setting(key) or []
            if found != [cycle[i % len(cycle)] for i in range(len(found))]:
                return f"{key} does not repeat {cycle}, as llama.cpp's {self.architecture} has it"
        return None

    @property
    def settings(self) -> dict[str, str]:
        """Metadata's keys, but for those of sizes, and the keys of config.json that they stand for."""
        return USUAL | {key: name for key, name in self.config.items() if isinstance(name, str)}


class GgufDescription(Record):
    """The forms in which a family is written, `uneven` (or why there is none) before `own`, and read: `own`."""

    own: GgufForm | None = None
    uneven: GgufForm | str = NO_FORM

    @property
    def forms(self) -> list[GgufForm]:
        """Those in which it is written, best first; `own` only where `uneven` asks for what it does not."""
        if isinstance(self.uneven, GgufForm) and self.own and self.own.requires == self.uneven.requires:
            return [self.uneven]
        return [form for form in (self.uneven, self.own) if isinstance(form, GgufForm)]
