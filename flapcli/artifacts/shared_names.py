"""Names as others may see them: without the folders of the machine that they were given on."""

from pathlib import Path


def is_local(name: str) -> bool:
    """Whether a name is a path on somebody's machine, and no hub id."""
    return Path(name).is_absolute() or name.startswith((".", "~"))


def shared_name(name: str) -> str:
    """The last part of a path, and a hub's id as it is."""
    return Path(name).name if is_local(name) else name


def shared_text(dataset: str | None) -> str | None:
    """A calibration's texts without their folders."""
    return dataset and "+".join(Path(part).name for part in dataset.split("+"))
