"""Writes a healed folder: a pruned one, file by file, with other values in the tensors that were trained."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from flapcli.architecture.flap_section import Healed
from flapcli.artifacts.model_card import seal
from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.pruned_folder import CARD, SINGLE, PrunedFolder
from flapcli.checkpoints import Checkpoint
from flapcli.checkpoints.shards import raw_bytes
from flapcli.checkpoints.weight_index import weight_map
from flapcli.healing.student import Student
from flapcli.progress import Progress
from flapcli.storage.atomic import require_space
from flapcli.storage.hashing import files_below
from flapcli.storage.safetensors_file import Header, StreamWriter, TensorSpec, read_header, read_into


@dataclass(frozen=True)
class Source:
    """The pruned folder, as flap reads it and as a checkpoint."""

    folder: PrunedFolder
    checkpoint: Checkpoint


def write_healed(out: Path, source: Source, student: Student, healed: Healed, progress: Progress) -> None:
    """Everything into `out`."""
    folder = source.folder
    shards = {file: read_header(folder.path / file) for file in sorted(set(weight_map(folder.path, SINGLE).values()))}
    total = sum(spec.nbytes for header in shards.values() for spec in header.tensors.values())
    require_space(out, total)
    trained = {source.checkpoint.name_in_files[name]: name for name in student.weights}
    with progress.task("write", total, "bytes") as advance:
        for file, header in shards.items():
            specs = sorted(header.tensors.values(), key=lambda spec: header.offsets[spec.name])
            with StreamWriter(out / file, specs, header.metadata) as writer:
                for spec in specs:
                    if spec.name in trained:
                        writer.write(spec.name, raw_bytes(student.written(trained[spec.name])))
                    else:
                        writer.write(spec.name, _copied(folder.path / file, header, spec))
                    advance(spec.nbytes)
    found, made_anew = files_below(folder.path), {*shards, "config.json", CARD}
    listed = folder.flap.files or found  # what a user put beside it stays there
    for name, path in found.items():
        if name in listed and name not in made_anew:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)
    section = folder.flap.model_copy(update={"healed": healed})
    seal(out, folder.config, section, load_plan(out / "plan.yaml"))


def _copied(path: Path, header: Header, spec: TensorSpec) -> memoryview:
    """A tensor's bytes as they are in the file."""
    data = memoryview(bytearray(spec.nbytes))
    if data:
        read_into(path, header.offsets[spec.name], data)
    return data
