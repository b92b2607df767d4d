"""What `flap push` sends: the folder, without this machine's paths; a public repository stays unfilled by --private."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml


@pytest.fixture
def hub(monkeypatch):
    """The calls that reach the hub's API: `sent` by name once a commit is made."""
    calls = SimpleNamespace(sent=None, private=True)

    def commit(_api, _repo, added, **_):
        calls.sent = {op.path_in_repo: opened(op) for op in added}

    def opened(op):
        with op.as_file() as file:
            return file.read()

    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda *_, **__: "https://hub/me/model")
    monkeypatch.setattr(api, "repo_info", lambda *_, **__: SimpleNamespace(private=calls.private))
    monkeypatch.setattr(api, "create_commit", commit)
    return calls


def test_what_is_sent_names_no_local_path(tiny, prune, flap, hub, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    pruned = run / "pruned"
    (pruned / "__pycache__").mkdir()
    (pruned / "__pycache__" / "x.pyc").touch()
    assert "https://hub/me/model" in flap("push", "me/model", "-d", run).stderr
    assert hub.sent.keys() == {path.name for path in pruned.iterdir() if path.is_file()}
    tests = str(tmp_path.parent.parent).encode()
    assert tests in (pruned / "config.json").read_bytes()
    for name, content in hub.sent.items():
        assert tests not in content, name
        if name not in ("config.json", "plan.yaml"):
            assert content == (pruned / name).read_bytes()
    ours, theirs = json.loads((pruned / "config.json").read_bytes()), json.loads(hub.sent["config.json"])
    assert theirs["flap"]["made_by"]["model"]["name"] == tiny("llama-gqa").name
    for config in (ours, theirs):
        config["flap"]["made_by"]["model"].pop("name")
        config["flap"]["made_by"].pop("dataset")
    assert theirs == ours
    plans = [yaml.safe_load(text) for text in ((pruned / "plan.yaml").read_text(), hub.sent["plan.yaml"])]
    assert plans[1]["stats"]["path"] == "stats.safetensors"
    for plan in plans:
        plan["model"].pop("name")
        plan["stats"].pop("path")
    assert plans[0] == plans[1]


def test_private_is_not_put_into_a_public_repository(tiny, prune, flap, hub, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    hub.private = False
    said = flap("push", "me/model", "-d", run, "--private", code=1).stderr
    assert "me/model is there and public" in " ".join(said.split())
    assert hub.sent is None
    flap("push", "me/model", "-d", run)
    assert hub.sent
