"""`flap export`: a checkpoint in another runtime's form, or the file that is there already."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from flapcli import __version__
from flapcli.artifacts.reuse import Kind
from flapcli.artifacts.run_dir import holding
from flapcli.artifacts.shared_names import shared_name
from flapcli.checkpoints import DEMO, Checkpoint, GgufCheckpoint, Hub, open_checkpoint
from flapcli.checkpoints.gguf import metadata_string
from flapcli.errors import FlapError, problems
from flapcli.export.kquants import advice
from flapcli.progress import Progress, Silent
from flapcli.storage.atomic import atomic_file
from flapcli.storage.hashing import files_sha256
from flapcli.storage.record import Record

if TYPE_CHECKING:
    from flapcli.export.tokenizer import Field


class ExportedModel(Record):
    name: str
    fingerprint: str


class Exported(Record):
    """What a GGUF was made from, kept in its metadata; `companions` is a hash of configuration and tokenizer."""

    format: Literal["flap-gguf/1"] = "flap-gguf/1"
    version: str
    model: ExportedModel
    outtype: str
    companions: str


@dataclass(frozen=True)
class ExportedGguf:
    """A file that was exported, its Modelfile, and what smaller quantisations of it would meet."""

    path: Path
    made_by: Exported
    advice: list[str]

    @property
    def modelfile(self) -> Path:
        return self.path.with_suffix(".Modelfile")

    def as_json(self) -> dict[str, object]:
        places = {"path": str(self.path), "modelfile": str(self.modelfile), "bytes": self.path.stat().st_size}
        return places | self.made_by.model_dump() | {"advice": self.advice}


def _load(path: Path) -> Exported:
    try:
        return Exported.model_validate_json(metadata_string(path, "flap") or "")
    except ValidationError as error:
        raise FlapError(f"{path} was not exported by flap: {problems(error)}") from error


def _is_ours(path: Path) -> bool:
    """Whether a file that can't be read as one of ours begins as one: cut short."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF" and b'"flap-gguf/' in file.read(2**26)


GGUF = Kind(_load, _is_ours, "exists and flap did not write it: move it away or write elsewhere")


@holding
def export_gguf(
    name: str | Path,
    out: Path,
    outtype: str = "f16",
    hub: Hub = Hub(),
    force: bool = False,
    progress: Progress = Silent(),
) -> tuple[ExportedGguf, bool]:
    """The GGUF of a checkpoint in `out`, and an Ollama Modelfile beside it; and whether both were there."""
    checkpoint = open_checkpoint(name, hub)
    if checkpoint.path.is_file():
        raise FlapError(f"{name} is a GGUF file already: give a checkpoint folder, such as DIR/pruned")
    model = ExportedModel(name=shared_name(checkpoint.name), fingerprint=checkpoint.fingerprint)
    files = [checkpoint.path / "config.json", *checkpoint.companions.values()]
    companions = files_sha256(checkpoint.path, files)
    made_by = Exported(version=__version__, model=model, outtype=outtype, companions=companions)
    exported = ExportedGguf(out, made_by, advice(checkpoint.shape))

    def same(found: Exported) -> bool:
        return found.model_copy(update={"version": __version__}) == made_by and exported.modelfile.exists()

    if GGUF.current(out, same, force):
        return exported, True
    _write(exported, checkpoint, progress)
    return exported, False


def _write(exported: ExportedGguf, checkpoint: Checkpoint, progress: Progress) -> None:
    from flapcli.execution.loading import quiet_transformers
    from flapcli.export.gguf_writer import entries, target, write
    from flapcli.export.modelfile import modelfile

    quiet_transformers()
    made_by = exported.made_by
    form = target(checkpoint)
    tensors = entries(checkpoint, form, made_by.outtype)
    vocabulary = _vocabulary(checkpoint, progress)
    description = json.dumps(made_by.model_dump())
    write(exported.path, checkpoint, form, made_by.outtype, tensors, vocabulary, description, progress)
    text = modelfile(exported.path.name, checkpoint.load_tokenizer(), _stop_ids(checkpoint))
    with atomic_file(exported.modelfile) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _vocabulary(checkpoint: Checkpoint, progress: Progress) -> list["Field"]:
    """The tokenizer of the GGUF that the model came from, which says all of it, else the folder's own.

    Also the folder's own where tokens were added to it since.
    """
    from flapcli.export.tokenizer import converted, copied

    source, rows = _source_gguf(checkpoint), checkpoint.vocabulary
    if source is not None and source.vocabulary == rows:
        return copied(source.reader)
    fields, notes = converted(checkpoint.load_tokenizer(), rows, checkpoint.name)
    for note in notes:
        progress.note(note)
    return fields


def _source_gguf(checkpoint: Checkpoint) -> GgufCheckpoint | None:
    """The GGUF at the beginning of a pruned folder's history, where it is still there and still the same."""
    while made_by := checkpoint.made_by:
        source = made_by.model
        if source.name != DEMO and not Path(source.name).exists():
            return None  # gone, or on the hub, which would send all of its weights; flap takes no GGUF file from there
        try:
            checkpoint = open_checkpoint(source.name, Hub(source.revision))
            if checkpoint.fingerprint != source.fingerprint:
                return None
        except FlapError:
            return None  # the source has gone; the folder holds a tokenizer of its own
        if isinstance(checkpoint, GgufCheckpoint):
            return checkpoint
    return None


def _stop_ids(checkpoint: Checkpoint) -> list[int]:
    """Tokens that end an answer: the tokenizer's and those of generation_config.json."""
    found: list[int] = []
    for ids in (checkpoint.load_tokenizer().eos_token_id, checkpoint.generation.get("eos_token_id")):
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return found
