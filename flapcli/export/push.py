"""`flap push`: a pruned folder to the hub."""

from pathlib import Path

from flapcli.artifacts.pruned_folder import PRUNED
from flapcli.errors import FlapError, first_line


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a pruned folder as `repo` (created where it is not there) and return its address.

    Raises FlapError where the folder is not flap's, and where the hub refuses or can't be reached.
    """
    if PRUNED.find(folder) is None:
        raise FlapError(f"nothing to push at {folder}: run `flap apply` first")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model pruned by flap")
    except HFValidationError as error:
        raise FlapError(f"{repo} is no valid repository name: give USER/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        hint = "set HF_TOKEN to a token that may write" if status in (401, 403) else "see the hub's answer by --debug"
        raise FlapError(f"the hub refused {repo} ({status}): {hint}") from error
    except Exception as error:  # connection errors come from the HTTP library that huggingface_hub uses
        raise FlapError(f"{repo}: the hub can't be reached: {first_line(error)}") from error
    return str(address)
