"""What is asked of the hub: the files that the index names, top level only; and what is told where it fails."""

import errno
import importlib
import json
import re
import ssl
from fnmatch import fnmatch

import huggingface_hub
import pytest
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import errors as hub_errors

from flapcli.checkpoints.locate import Hub, download
from flapcli.errors import FlapError
from flapcli.texts.corpus import tokens_of

# The HTTP library that huggingface_hub is built on, httpx or its successor.
httpx = importlib.import_module(hub_errors.HTTPError.__module__.split(".")[0])

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


REQUEST = httpx.Request("GET", "https://hub/some/model")


def answered(kind, status):
    return kind("refused", response=httpx.Response(status, request=REQUEST))


def caused(error, cause):
    error.__cause__ = cause
    return error


NETWORK, DISK = "the hub can't be reached", "the download can't be kept"
FULL = OSError(errno.ENOSPC, "No space left on device", "/cache/blob")
WHAT_IS_RAISED = [
    (httpx.ProxyError("407 Proxy Authentication Required"), NETWORK),
    (httpx.ConnectTimeout("timed out"), NETWORK),
    (httpx.ReadTimeout("timed out"), NETWORK),
    (httpx.RemoteProtocolError("peer closed connection"), NETWORK),
    (caused(httpx.ConnectError("refused"), PermissionError(errno.EPERM, "a firewall's")), NETWORK),
    (ssl.SSLError(1, "CERTIFICATE_VERIFY_FAILED"), NETWORK),
    (hub_errors.OfflineModeIsEnabled("offline"), NETWORK),
    (caused(hub_errors.LocalEntryNotFoundError("none"), httpx.ConnectTimeout("timed out")), NETWORK),
    (caused(hub_errors.LocalEntryNotFoundError("none"), answered(hub_errors.HfHubHTTPError, 503)), "answers 503: try"),
    (answered(hub_errors.HfHubHTTPError, 429), "the hub answers 429 (too many requests)"),
    (FULL, f"{DISK} (/cache/blob): No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "/cache"), f"{DISK} (/cache): Permission denied"),
    (FileExistsError(errno.EEXIST, "File exists", "/cache"), DISK),
    (RuntimeError("Data processing error: No space left on device (os error 28)"), DISK),
    (caused(DatasetGenerationError("while generating the dataset"), FULL), DISK),
    (RuntimeError("something else"), "something else"),
]


@pytest.mark.parametrize(("error", "words"), WHAT_IS_RAISED)
def test_network_disk_and_answers_are_told_apart(error, words, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for ask in (lambda: download("some/model", Hub()), lambda: tokens_of("ptb", None, "train", "text")):
        with pytest.raises(FlapError, match=re.escape(words)) as told:
            ask()
        assert (NETWORK in str(told.value)) == (words == NETWORK)
        assert (DISK in str(told.value)) == (DISK in words)


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        (hub_errors.GatedRepoError, 403, "is gated"),
        (hub_errors.RepositoryNotFoundError, 404, "no such model on the hub"),
        (hub_errors.RevisionNotFoundError, 404, "has no revision v9"),
    ],
)
def test_what_the_hub_does_not_have_or_give(kind, status, words, monkeypatch):
    def refuse(*_, **__):
        raise answered(kind, status)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FlapError, match=words):
        download("some/model", Hub(revision="v9"))
