"""`flap push`: a pruned folder to the hub, without the paths of the machine that it was made on."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from flapcli.artifacts.plan import load_plan, save_plan
from flapcli.artifacts.pruned_folder import PRUNED, PrunedFolder
from flapcli.artifacts.shared_names import shared_name, shared_text
from flapcli.checkpoints.hub_errors import why
from flapcli.errors import FlapError
from flapcli.storage.hashing import files_below

LOCAL = (".git", ".cache", "__pycache__")  # what tools leave in a folder


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a pruned folder as `repo` (created where it is not there) and return its address.

    Raises FlapError where the folder is not flap's, where `private` is asked of a repository that is public, and
    where the hub refuses or can't be reached.
    """
    try:
        pruned = PRUNED.find(folder)
    except FlapError as error:
        raise FlapError(f"{folder} is no folder that flap pruned, and only those are pushed") from error
    if pruned is None:
        raise FlapError(f"nothing to push at {folder}: run `flap apply` first")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api, files = HfApi(), shareable(pruned)
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise FlapError(
                f"{repo} is there and public, which --private does not change: make it private in its settings on the "
                "hub, or leave out --private"
            )
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, added, commit_message="Upload a model pruned by flap")
    except HFValidationError as error:
        raise FlapError(f"{repo} is no valid repository name: give USER/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        hint = "set HF_TOKEN to a token that may write" if status in (401, 403) else "see the hub's answer by --debug"
        raise FlapError(f"the hub refused {repo} ({status}): {hint}") from error
    except FlapError:
        raise
    except Exception as error:  # connection errors come from the HTTP library that huggingface_hub uses
        raise FlapError(f"{repo}: {why(error, '')}") from error
    return str(address)


def shareable(pruned: PrunedFolder) -> dict[str, str | bytes]:
    """Files of a pruned folder by relative name: their paths, and what is sent in place of those that hold local paths.

    config.json and plan.yaml name the model, the statistics and the text by the last part of their paths.
    """
    files: dict[str, str | bytes] = {name: str(path) for name, path in files_below(pruned.path, LOCAL).items()}
    made_by = pruned.flap.made_by
    model = made_by.model.model_copy(update={"name": shared_name(made_by.model.name)})
    made_by = made_by.model_copy(update={"model": model, "dataset": shared_text(made_by.dataset)})
    healed = pruned.flap.healed
    if healed:
        settings = healed.settings | {"dataset": shared_text(healed.dataset)}
        healed = healed.model_copy(update={"settings": settings})
    config = pruned.config | {"flap": pruned.flap.model_copy(update={"made_by": made_by, "healed": healed}).as_json()}
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    if "plan.yaml" in files:
        plan = load_plan(pruned.path / "plan.yaml")
        update = {
            "model": plan.model.model_copy(update={"name": shared_name(plan.model.name)}),
            "stats": plan.stats.model_copy(update={"path": Path(plan.stats.path).name}),
        }
        with TemporaryDirectory() as scratch:
            save_plan(Path(scratch) / "plan.yaml", plan.model_copy(update=update))
            files["plan.yaml"] = (Path(scratch) / "plan.yaml").read_bytes()
    return files
