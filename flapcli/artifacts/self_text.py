"""The artifact self.json: the windows that a model wrote for its own calibration, to read and to take elsewhere."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.shape import ModelShape
from flapcli.artifacts.reuse import Kind, load_json
from flapcli.errors import FlapError
from flapcli.storage.atomic import atomic_file
from flapcli.storage.record import Record

FORMAT: Literal["flap-self/1"] = "flap-self/1"


class Window(Record):
    """The tokens that calibration reads, and the text that they are (which may not give these tokens again)."""

    text: str
    tokens: list[int]


class SelfText(Record):
    """`model`, `revision` and `fingerprint` are the writer's, `dtype` what it ran in.

    `tokenizer_sha256` is of the files that decided token ids, None in older files.
    """

    format: Literal["flap-self/1"] = FORMAT
    model: str
    revision: str | None = None
    fingerprint: str
    nsamples: int
    seqlen: int
    seed: int
    dtype: str
    tokenizer_sha256: str | None = None
    versions: dict[str, str]
    windows: list[Window]

    @property
    def array(self) -> NDArray[np.int64]:
        """Token ids, (nsamples, seqlen)."""
        return np.asarray([window.tokens for window in self.windows], np.int64).reshape(self.nsamples, self.seqlen)

    def is_of(self, model: ModelShape, nsamples: int, seqlen: int, seed: int) -> bool:
        """Whether this is what that model samples, asked for so much."""
        asked = (model.fingerprint, model.revision, nsamples, seqlen, seed)
        return (self.fingerprint, self.revision, self.nsamples, self.seqlen, self.seed) == asked


def path_beside(stats: Path) -> Path:
    """Where the text of the statistics at `stats` lies."""
    return stats.with_name("self.json")


def save_selftext(path: Path, made: SelfText) -> None:
    """Write the artifact atomically, a window a line. Raises FlapError where the file system refuses."""
    head = json.dumps(made.model_dump(exclude={"windows"}), indent=1, ensure_ascii=False)
    rows = ",\n  ".join(json.dumps(window.model_dump(), ensure_ascii=False) for window in made.windows)
    with atomic_file(path) as scratch:
        scratch.write_text(f'{head[:-2]},\n "windows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def _load(path: Path) -> SelfText:
    found = load_json(path, SelfText, f"no text at {path}")
    try:
        if found.array.shape == (found.nsamples, found.seqlen):
            return found
    except ValueError:
        pass  # windows of unlike lengths
    raise FlapError(f"{path}: its windows are not {found.nsamples} of {found.seqlen} tokens")


def load_selftext(path: Path) -> SelfText | None:
    """What is at `path`; None where nothing is. Raises FlapError where it is something else."""
    foreign = f"exists and is no text that flap sampled ({FORMAT}): move it away or write elsewhere"
    return Kind(_load, lambda _path: False, foreign).find(path)
