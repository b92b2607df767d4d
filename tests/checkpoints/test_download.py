"""What is asked of the hub: the files that the index names, top level only."""

import json
from fnmatch import fnmatch

import huggingface_hub
import pytest

from flapcli.checkpoints.locate import Hub, download

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIN = ["pytorch_model-00001-of-00001.bin"]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A repository of these files, and the names that were fetched of it."""

    def repository(files):
        fetched: set[str] = set()

        def snapshot(_repo, allow_patterns, ignore_patterns, **_):
            for name, content in files.items():
                wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
                if wanted and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                    fetched.add(name)
                    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / name).write_text(content)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        download("some/model", Hub())
        return fetched

    return repository


def index(names):
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}})


def test_what_the_index_names_is_fetched_and_no_more(asked):
    others = ["consolidated.safetensors", "onnx/model.safetensors", "original/params.json"]
    others += ["config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"]
    files = dict.fromkeys([*SHARDS, *BIN, *others], "")
    indices = {"model.safetensors.index.json": index(SHARDS), "pytorch_model.bin.index.json": index(BIN)}
    fetched = asked(files | indices)
    weights = {name for name in fetched if name.endswith((".safetensors", ".bin"))}
    assert weights == set(SHARDS)
    assert {"config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"} <= fetched
    assert "original/params.json" not in fetched


def test_a_stray_file_does_not_stop_the_bin_weights(asked):
    fetched = asked({"adapter.safetensors": "", "config.json": "{}", "pytorch_model.bin": ""})
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == {"pytorch_model.bin"}


def test_one_file_without_an_index(asked):
    fetched = asked(
        {"model.safetensors": "", "consolidated.safetensors": "", "config.json": "{}", "pytorch_model.bin": ""}
    )
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == {"model.safetensors"}
