"""A folder that flap pruned, by its config.json. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flapcli.architecture.flap_section import FlapSection
from flapcli.architecture.parallel import device_counts
from flapcli.artifacts.reuse import Kind
from flapcli.checkpoints.weight_index import index_of, weight_map
from flapcli.errors import FlapError, UsageError
from flapcli.progress import Progress
from flapcli.storage.atomic import free_name
from flapcli.storage.hashing import files_below
from flapcli.storage.json_file import read_json
from flapcli.storage.safetensors_file import read_header

CARD = "README.md"
SINGLE = "model.safetensors"
CARD_MARK = "<!-- Written by flap, and anew by `flap eval`; remove this line to keep text of your own. -->"


@dataclass(frozen=True)
class PrunedFolder:
    """Where it lies, its config.json, and what flap says of itself there."""

    path: Path
    config: dict[str, Any]
    flap: FlapSection

    @property
    def tensor_parallel(self) -> list[int]:
        """Over how many devices its layers split evenly, whatever may be served so."""
        return device_counts(self.flap.layers())

    def as_json(self) -> dict[str, Any]:
        return self.config | {"tensor_parallel": self.tensor_parallel}


def load_pruned(path: Path) -> PrunedFolder:
    """Read a pruned folder's config.json. Raises FlapError where it can't be read, or flap did not write it."""
    place = path / "config.json"
    config = read_json(place, f"{path} is no pruned folder")
    if (flap := FlapSection.of(config, str(path))) is None:
        raise FlapError(f"{path} is a checkpoint that flap did not write (model_type {config.get('model_type')!r:.60})")
    return PrunedFolder(path, config, flap)


def is_whole(folder: PrunedFolder, companions: Mapping[str, Path]) -> bool:
    """Whether all that flap wrote is there as it was written, but for what its user changed.

    Copies of `companions`, the source's files beside its weights, are compared with them.
    """
    if not weights_are_whole(folder):
        return False
    if folder.flap.files is None:  # of an older version, which kept no list
        return True
    sizes, theirs = file_sizes(folder.path), {*users_files(folder), CARD}
    copies = (name for name in companions if name not in theirs)
    return (
        folder.flap.files.keys() <= sizes.keys()
        and all(sizes[name] == size for name, size in folder.flap.files.items() if name not in theirs)
        and all(name in sizes and (folder.path / name).read_bytes() == companions[name].read_bytes() for name in copies)
    )


def weights_are_whole(folder: PrunedFolder) -> bool:
    """Whether every weight file that the index names is there in its full length, with the tensors it should hold."""
    try:
        index = weight_map(folder.path, SINGLE)
        headers = {file: read_header(folder.path / file) for file in set(index.values())}
        return all(name in headers[file].tensors for name, file in index.items())
    except FlapError:
        return False


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder but its config.json, by relative name."""
    return {name: path.stat().st_size for name, path in files_below(folder).items() if name != "config.json"}


def users_files(folder: PrunedFolder) -> list[str]:
    """Files of a pruned folder that are the user's: not on its own list, of another size, or newer than config.json.

    Not its model card, which `flap eval` renews, and not files that are broken. Empty for folders without a list.
    """
    listed = folder.flap.files
    if listed is None:
        return []
    written = (folder.path / "config.json").stat().st_mtime_ns

    def is_users(name: str, size: int) -> bool:
        path = folder.path / name
        if size == listed.get(name) and path.stat().st_mtime_ns <= written:
            return False
        return not (is_own_card(path) if name == CARD else name in listed and _is_broken(path))

    return [name for name, size in file_sizes(folder.path).items() if is_users(name, size)]


def is_own_card(path: Path) -> bool:
    """Whether a README.md is the model card that flap wrote, and its owner left to it."""
    try:
        return CARD_MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _is_broken(path: Path) -> bool:
    """Whether a file is empty, safetensors or JSON that was cut short or scrambled, or an index without tensors."""
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.name == index_of(SINGLE):
            weight_map(path.parent, SINGLE)
        elif path.suffix == ".json":
            read_json(path)
        return not path.stat().st_size
    except (FlapError, OSError):
        return True


def check_not_source(out: Path, model: Path | str) -> None:
    """Raise UsageError where a model would be pruned into its own folder."""
    if out.exists() and Path(model).exists() and out.resolve() == Path(model).resolve():
        raise UsageError(f"{out} is the model itself, which its pruned child would replace: write elsewhere")


PRUNED = Kind(
    load_pruned,
    lambda path: path.is_dir() and not any(path.iterdir()),  # an empty folder
    "holds something that flap did not write: move it away or write elsewhere",
)


def keeps_old(out: Path, force: bool, progress: Progress) -> bool:
    """Whether the folder that is to be replaced holds what is the user's. Raises FlapError unless forced."""
    found = PRUNED.find(out)
    if not found or not (theirs := users_files(found)):
        return False
    some = ", ".join(theirs[:3]) + (f" and {len(theirs) - 3} more" if len(theirs) > 3 else "")
    if not force:
        raise FlapError(
            f"{out} holds files that flap did not write, or that were changed since ({some}): move them away or "
            "write elsewhere; --force moves the whole folder aside"
        )
    progress.note(f"{out} holds {some}, which flap did not write: the old folder is kept as {free_name(out)}")
    return True


def found_pruned(path: Path) -> PrunedFolder | None:
    """The pruned folder at `path` where one can be read, for those who only show what is there."""
    try:
        return load_pruned(path)
    except FlapError:
        return None
