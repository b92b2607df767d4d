"""The `flap` section of a pruned folder's config.json: which sizes its layers have, and what it was made from.

`modeling_flap.py` reads the same keys as plain JSON, since it must work where flap is not installed.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ValidationError

from flapcli.architecture.shape import LayerShape, Module
from flapcli.errors import FlapError, problems
from flapcli.storage.record import Record

FORMAT: Literal["flap-checkpoint/1"] = "flap-checkpoint/1"


def adds_bias(compensate: str | None, with_bias: bool) -> bool:
    """Whether a compensation adds biases, `with_bias` being --bias of lstsq."""
    return compensate == "bias" or (compensate == "lstsq" and with_bias)


class SourceModel(Record):
    """The checkpoint that was pruned."""

    name: str
    revision: str | None = None
    fingerprint: str


class MadeBy(Record):
    """What a pruned folder was made from and how; defaults are what folders of older versions stand for.

    `companions_sha256` is of the source's files beside its weights; None of a GGUF, and in folders of older versions,
    which pass for those of any. `license`, `dataset` and `dataset_sha256` are for the model card and for `flap eval`;
    nothing else depends on them.
    """

    version: str
    model: SourceModel
    plan_sha256: str
    stats_sha256: str
    compensate: Literal["none", "bias", "lstsq"]
    ridge: float | None
    lstsq_bias: bool = True
    mask_only: bool
    remote_code: str
    dtype: str | None
    max_shard_size: str
    sequential: bool = False
    companions_sha256: str | None = None
    license: str | None = None
    dataset: str | None = None
    dataset_sha256: str | None = None

    def same_as(self, other: Self) -> bool:
        """Whether this, as found, and the other as asked for stand for the same folder, whichever version wrote it."""
        aside = {"version", "license", "dataset", "dataset_sha256"}
        aside |= {"companions_sha256"} if self.companions_sha256 is None else set()
        return self.model_dump(exclude=aside) == other.model_dump(exclude=aside)


class HealingPoint(Record):
    """Mean losses after so many tokens: of what was trained on since the point before, and on held-out windows."""

    tokens: int
    training: float | None
    validation: float


class Healed(Record):
    """How a pruned folder was trained after the cut, as `settings` say.

    `input_sha256` is of what the folder that was trained says of itself, `text_sha256` of the texts on this machine.
    The weights are those after `best` tokens of `tokens`; `before` and `after` are losses on held-out windows, `after`
    of the weights as written.
    """

    version: str
    input_sha256: str
    settings: dict[str, Any]
    text_sha256: str | None
    tokens: int
    best: int
    before: float
    after: float
    curve: list[HealingPoint]

    @property
    def dataset(self) -> str:
        return str(self.settings["dataset"])


class ModuleLayout(Record):
    """A module as modeling_flap.py rebuilds it, its projections and what else follows their sizes.

    `producers` maps a projection to what it counts, `rows` being those for one of it, or to its rows layer by layer;
    `channels` is the producer that has the output's channels, or their number layer by layer. Layer by layer too, and
    left out where nothing changes: rows of `unit_tensors`, `attributes`, and under `kept_heads` which of the
    configuration's heads stay, by which `head_arguments` are cut (`architecture.family`). `experts` counts those of a
    layer, whose tensors have an axis more, (in, out) where `transposed`. `adds_residual` is of older versions.
    """

    kind: Module
    output: str
    producers: dict[str, str | list[int]]
    rows: dict[str, int] | None = None
    channels: str | list[int]
    unit_tensors: dict[str, list[int]] | None = None
    attributes: dict[str, list[int]] | None = None
    experts: list[int] | None = None
    transposed: bool | None = None
    head_arguments: dict[str, int] | None = None
    kept_heads: list[list[int]] | None = None
    adds_residual: bool | None = None


class FlapSection(Record):
    """Sizes of every layer as written, in order, and biases that the family's own configuration does not know.

    `parameters` is None in folders of older versions, `source_layers` where all layers were written, `output_error`
    (per layer: share of the output's variance lost with the pruned channels' mean, and with least squares) without
    least squares, `modules` in a stock checkpoint, which needs no modeling_flap.py; `decoder_layers` is where the
    layers are in the model where that is not model.layers. `files` are the sizes in bytes of
    what else was written into the folder, by which a user's files there are told; None in folders of older versions.
    `healed` is of a folder that was trained since.
    """

    format: Literal["flap-checkpoint/1"] = FORMAT
    num_attention_heads: list[int]
    num_key_value_heads: list[int]
    intermediate_size: list[int]
    shared_expert_size: list[int] | None = None
    num_experts: list[int] | None = None
    expert_size: list[int] | None = None
    biases: list[str]
    parameters: int | None = None
    source_layers: list[int] | None = None
    output_error: dict[Module, list[tuple[float, float] | None]] | None = None
    modules: list[ModuleLayout] | None = None
    decoder_layers: str | None = None
    files: dict[str, int] | None = None
    made_by: MadeBy
    healed: Healed | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Self | None:
        """The section of a config.json, None of one without. Raises FlapError where it is no such section."""
        if config.get("flap") is None:
            return None
        try:
            return cls.model_validate(config["flap"])
        except ValidationError as error:
            raise FlapError(f"{where}: `flap` in config.json is not of format {FORMAT}: {problems(error)}") from error

    def layers(self) -> list[LayerShape]:
        """Each layer's sizes. Raises FlapError where the lists of sizes are not equally long."""
        given = [getattr(self, size) for size in LayerShape._fields]
        columns = [[0] * len(self.intermediate_size) if column is None else column for column in given]
        if len({len(column) for column in columns}) > 1:
            raise FlapError(f"config.json: the per-layer sizes under `flap` are not {len(columns[0])} values each")
        return [LayerShape(*row) for row in zip(*columns, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """What config.json holds: what does not apply is left out, what a folder was made by is whole."""
        whole = {"made_by": self.made_by, "healed": self.healed}
        found = self.model_dump(exclude_none=True, exclude=set(whole))
        return found | {key: value.model_dump() for key, value in whole.items() if value}
