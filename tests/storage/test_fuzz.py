"""Whatever bytes lie there, a reader reads them or says in an error of ours what is wrong; quickly, in little memory.

Valid files are mutated, as bytes and as trees. The suite draws the same examples every time; to draw others for as
long as it takes: FLAP_FUZZ_EXAMPLES=20000 pytest tests/storage/test_fuzz.py. What failed once stands here as @example.
"""

import json
import os
import resource
import struct
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from support.gguf_files import write_gguf

from flapcli.artifacts.plan import load_plan
from flapcli.checkpoints import open_checkpoint
from flapcli.checkpoints.gguf_header import read_gguf_header
from flapcli.errors import FlapError
from flapcli.storage.safetensors_file import read_header

ASKED = os.environ.get("FLAP_FUZZ_EXAMPLES")
MEMORY = 200_000_000  # bytes by which one example may raise this process's peak
FUZZ = settings(
    max_examples=int(ASKED or 150), derandomize=not ASKED, database=None, deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
)  # fmt: skip

WORDS = [
    b"-1", b"1e999", b"NaN", b"null", b"[", b"{", b"]", b"}", b'"', b":", b"\n", b"*a", b"&a ", b"!!",
    b"\xff" * 4, b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<I", 9), b"9" * 5000, b"[" * 100_000,
    b"\xed\xa0\x80",
]  # fmt: skip
numbers = st.one_of(st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**7]), st.floats())
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.sampled_from(["F32", "0-2", "llama"]))
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """Some of the bytes replaced, inserted, doubled or taken out."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 20))
        data[place : place + length] = draw(st.sampled_from(WORDS) | st.binary(max_size=12) | st.just(bytes(data[:40])))
    return bytes(data)


@st.composite
def spoilt(draw: st.DrawFn, valid: Any) -> Any:
    """A tree of which one node became something else, or has a key of a stranger's."""
    tree = node = json.loads(json.dumps(valid))
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        if not (isinstance(node[key], dict | list) and node[key]) or draw(st.integers(0, 2)) == 0:
            break
        node = node[key]
    node[key] = draw(values)
    if isinstance(node, dict):
        node |= draw(st.dictionaries(st.text(max_size=8), values, max_size=1))
    return tree


def fuzz(read: Any, path: Path, contents: st.SearchStrategy[bytes], *seeds: bytes) -> None:
    """Hold `read` of `path` to its promise for all `contents`, and for the `seeds`."""

    def once(data: bytes) -> None:
        path.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read(path)
        except FlapError as error:
            assert len(str(error)) < 3000
        assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MEMORY

    for seed in seeds:
        once = example(data=seed)(once)
    FUZZ(given(data=contents)(once))()


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def with_header(raw: bytes, tail: bytes = bytes(48)) -> bytes:
    return struct.pack("<Q", len(raw)) + raw + tail


def test_safetensors_headers(tmp_path):
    entry = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}
    tree = {"__metadata__": {"a": "b"}, "x": entry, "y": entry | {"shape": [6], "data_offsets": [24, 48]}}
    path = tmp_path / "x.safetensors"
    valid = with_header(as_json(tree))

    def read(path: Path) -> None:
        header = read_header(path)
        for name, spec in header.tensors.items():
            assert all(type(size) is int and size >= 0 for size in spec.shape)
            assert 8 <= header.offsets[name] <= header.offsets[name] + spec.nbytes <= path.stat().st_size

    path.write_bytes(valid)
    read(path)
    seeds = [with_header(as_json(tree | {"x": entry | bad})) for bad in SAFETENSORS]
    contents = mutated(valid) | spoilt(tree).map(as_json).map(with_header) | st.binary(max_size=60)
    fuzz(read, path, contents, *seeds, with_header(b"[]"), with_header(b'{"__metadata__": [1]}', b""))


SAFETENSORS: list[dict[str, Any]] = [
    {"shape": [3.0, 2.0]}, {"shape": [True, 6]}, {"shape": [-3, -2]}, {"dtype": [1]}, {"data_offsets": [0.0, 24.0]},
    {"data_offsets": [-24, 0]}, {"shape": [2**62, 2**62, 0], "data_offsets": [24, 24]},
]  # fmt: skip


def test_gguf_headers(tiny, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tiny("llama-gqa"))
    whole = path.read_bytes()
    cut = len(read_gguf_header(path).raw)

    def read(path: Path) -> None:
        for tensor in read_gguf_header(path).tensors:
            assert tensor.nbytes >= 0
            assert prod(tensor.shape) >= 0
        _ = open_checkpoint(path).shape

    read(path)
    layers = whole.index(b"llama.block_count") + len(b"llama.block_count") + 4
    many = [whole[:layers] + struct.pack("<I", count) + whole[layers + 4 :] for count in (10**5, 2**32 - 1)]
    contents = mutated(whole[:cut]).map(lambda head: head + whole[cut:]) | st.binary(max_size=60).map(b"GGUF".__add__)
    fuzz(read, path, contents, *many)


@pytest.fixture(scope="module")
def run(prune, tiny, tmp_path_factory):
    return prune(tiny("llama-gqa"), tmp_path_factory.mktemp("run"))


def test_plans(run, tmp_path):
    valid = (run / "plan.yaml").read_bytes()

    def read(path: Path) -> None:
        plan = load_plan(path)
        assert [plan.counts(module) for module in ("attention", "mlp")]

    tree = yaml.safe_load(valid)
    alone = tree["parameters"] | {"per_unit": {"mlp": tree["parameters"]["per_unit"]["mlp"]}}
    odd = [tree | {"parameters": bad} for bad in (alone, tree["parameters"] | {"model": 1})]
    odd.append(tree | {"layers": [tree["layers"][0] | {"mlp": tree["layers"][0]["mlp"] | {"keep": "9" * 5000}}]})
    contents = mutated(valid) | spoilt(tree).map(as_json) | st.binary(max_size=60)
    fuzz(read, tmp_path / "plan.yaml", contents, b"format: 2020-99-99", b"9" * 5000, *map(as_json, odd))


def test_configurations(run, tmp_path):
    """Of a pruned folder, whose section of flap's is read too."""
    folder = run / "pruned"
    path = folder / "config.json"
    valid = path.read_bytes()

    def read(path: Path) -> None:
        checkpoint = open_checkpoint(path.parent)
        _ = checkpoint.shape
        checkpoint.load_config()

    contents = mutated(valid) | spoilt(json.loads(valid)).map(as_json) | st.binary(max_size=60)
    tree = json.loads(valid)
    odd = [tree | {key: ["long"] * 1000} for key in ("model_type", "vocab_size", "pretraining_tp")]
    fuzz(read, path, contents, b"[" * 100_000, b"[]", *map(as_json, odd))
