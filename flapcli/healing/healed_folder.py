"""Writes a healed folder: a pruned one, file by file, with other values in the tensors that were trained."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from flapcli.architecture.flap_section import Healed
from flapcli.artifacts.model_card import model_card
from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.pruned_folder import CARD, SINGLE, PrunedFolder, file_sizes, users_files
from flapcli.checkpoints import Checkpoint
from flapcli.checkpoints.shards import raw_bytes
from flapcli.checkpoints.weight_index import weight_map
from flapcli.healing.student import Student
from flapcli.progress import Progress
from flapcli.storage.atomic import require_space
from flapcli.storage.hashing import files_below
from flapcli.storage.safetensors_file import StreamWriter, read_header, read_into


@dataclass(frozen=True)
class Source:
    """The pruned folder, as flap reads it and as a checkpoint."""

    folder: PrunedFolder
    checkpoint: Checkpoint


def write_healed(out: Path, source: Source, student: Student, healed: Healed, progress: Progress) -> None:
    """Everything into `out`; config.json is the last, for what is newer is the user's."""
    folder = source.folder
    shards = {file: read_header(folder.path / file) for file in sorted(set(weight_map(folder.path, SINGLE).values()))}
    total = sum(spec.nbytes for header in shards.values() for spec in header.tensors.values())
    require_space(out, total)
    names = {source.checkpoint.name_in_files[name]: name for name in student.weights}
    with progress.task("write", total, "bytes") as advance:
        for file, header in shards.items():
            specs = sorted(header.tensors.values(), key=lambda spec: header.offsets[spec.name])
            with StreamWriter(out / file, specs, header.metadata) as writer:
                for spec in specs:
                    changed = student.written(names[spec.name]) if spec.name in names else None
                    copied = bytearray(0 if changed is not None else spec.nbytes)
                    if copied:
                        read_into(folder.path / file, header.offsets[spec.name], memoryview(copied))
                    writer.write(spec.name, memoryview(copied) if changed is None else raw_bytes(changed))
                    advance(spec.nbytes)
    for name, path in files_below(folder.path).items():
        if name not in shards and name not in ("config.json", CARD) and name not in users_files(folder):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)
    section = folder.flap.model_copy(update={"healed": healed})
    config = folder.config | {"flap": section.as_json()}
    (out / CARD).write_text(model_card(config, load_plan(out / "plan.yaml"), None), encoding="utf-8")
    config["flap"] = section.model_copy(update={"files": file_sizes(out)}).as_json()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
