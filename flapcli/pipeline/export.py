"""`flap export`: a checkpoint in another runtime's form, or the file that is there already."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli import __version__
from flapcli.checkpoint import DEMO, Checkpoint, GgufCheckpoint, Hub, open_checkpoint
from flapcli.checkpoint.gguf import metadata_string
from flapcli.errors import FlapError
from flapcli.export.kquants import advice
from flapcli.progress import Progress
from flapcli.rundir import files_sha256

if TYPE_CHECKING:
    from flapcli.export.vocabulary import Field

FORMAT = "flap-gguf/1"


def run_export_gguf(
    out: Path, name: str, hub: Hub, outtype: str, force: bool, progress: Progress
) -> tuple[dict[str, Any], bool]:
    """The GGUF of a checkpoint in `out`, and an Ollama Modelfile beside it. Returns what the file is."""
    checkpoint = open_checkpoint(name, hub)
    if checkpoint.path.is_file():
        raise FlapError(f"{name} is a GGUF file already: give a checkpoint folder, such as DIR/pruned")
    made_by = {
        "format": FORMAT,
        "version": __version__,
        "model": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        "outtype": outtype,
        "companions": _companions(checkpoint.path),
    }
    found = _existing(out)
    same = found is not None and _same(found, made_by) and _modelfile_of(out).exists()
    if not (cached := same and not force):
        _write(out, checkpoint, made_by, progress)
    told = {
        "path": str(out),
        "modelfile": str(_modelfile_of(out)),
        "bytes": out.stat().st_size,
        **made_by,
        "advice": advice(checkpoint.shape),
    }
    return told, cached


def _companions(folder: Path) -> str:
    """Hash of what the export reads besides weights: configuration, tokenizer, chat template."""
    return files_sha256(folder, (path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model")))


def _write(out: Path, checkpoint: Checkpoint, made_by: dict[str, Any], progress: Progress) -> None:
    from flapcli.export.gguf import entries, write
    from flapcli.export.modelfile import modelfile
    from flapcli.loading import quiet_transformers
    from flapcli.rundir import atomic_file

    quiet_transformers()
    work = entries(checkpoint, made_by["outtype"])
    vocabulary = _vocabulary(checkpoint, progress)
    write(out, checkpoint, work, vocabulary, json.dumps(made_by), made_by["outtype"], progress)
    text = modelfile(out.name, checkpoint.load_tokenizer(), _stop_ids(checkpoint))
    with atomic_file(_modelfile_of(out)) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _vocabulary(checkpoint: Checkpoint, progress: Progress) -> list["Field"]:
    """The tokenizer of the GGUF that the model came from, which says all of it, else the folder's own.

    Also the folder's own where tokens were added to it since.
    """
    from flapcli.export.gguf import embedding_rows
    from flapcli.export.vocabulary import converted, copied

    source, rows = _source_gguf(checkpoint), embedding_rows(checkpoint)
    if source is not None and embedding_rows(source) == rows:
        return copied(source.reader)
    fields, notes = converted(checkpoint.load_tokenizer(), rows, checkpoint.name)
    for note in notes:
        progress.note(note)
    return fields


def _source_gguf(checkpoint: Checkpoint) -> GgufCheckpoint | None:
    """The GGUF at the beginning of a pruned folder's history, where it is still there and still the same."""
    while made_by := (checkpoint.config.get("flap") or {}).get("made_by"):
        recorded = made_by["model"]
        if recorded["name"] != DEMO and not Path(recorded["name"]).exists():
            return None  # gone, or on the hub, which would send all of its weights; flap takes no GGUF file from there
        try:
            checkpoint = open_checkpoint(recorded["name"], Hub(recorded.get("revision")))
            if checkpoint.fingerprint != recorded["fingerprint"]:
                return None
        except FlapError:
            return None  # the source has gone; the folder holds a tokenizer of its own
        if isinstance(checkpoint, GgufCheckpoint):
            return checkpoint
    return None


def _stop_ids(checkpoint: Checkpoint) -> list[int]:
    """Tokens that end an answer: the tokenizer's and those of generation_config.json."""
    found: list[int] = []
    path = checkpoint.path / "generation_config.json"
    listed = json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else None
    for ids in (checkpoint.load_tokenizer().eos_token_id, listed):
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return found


def _modelfile_of(out: Path) -> Path:
    return out.with_suffix(".Modelfile")


def _existing(out: Path) -> dict[str, Any] | None:
    """What the file at `out` was made from, None where nothing is there; refuses what flap did not write."""
    if not out.exists():
        return None
    try:
        made_by = json.loads(metadata_string(out, "flap") or "")
        if made_by["format"] == FORMAT:
            return made_by
    except (FlapError, ValueError, KeyError, TypeError):
        pass
    raise FlapError(f"{out} exists and flap did not write it: move it away or give another --out")


def _same(found: dict[str, Any], asked: dict[str, Any]) -> bool:
    return all(found.get(key) == asked[key] for key in asked if key != "version")
