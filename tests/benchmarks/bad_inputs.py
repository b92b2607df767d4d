"""Hundreds of bad inputs, each a good one spoilt: what is said of them, what is lost, how much memory it takes.

    python tests/benchmarks/bad_inputs.py [PART OF A CASE'S NAME ...]

Every case runs in a fork of this process on a copy of its own. Prints the cases that went wrong and a table of what
must be 0; exits 1 where it is not.
"""

import argparse
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from support.forks import start
from support.gguf_files import write_gguf
from support.models import make_tiny, to_bin

GIB = 2**30
TEXT = "the quick brown fox jumps over the lazy dog; " * 400
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefghi", "bcdefghij", strict=True)
)
SMALL = "--dataset {text} --seqlen 16 --nsamples 4"
CALIBRATE = f"calibrate {{here}} -d {{out}} {SMALL}"
IN_MEMORY, STREAMED = f"{CALIBRATE} --no-stream", f"{CALIBRATE} --stream"
EVAL = "eval {here} -o {out}/eval.json --perplexity {text} --seqlen 16"
EXPORT = "export gguf {here} -o {out}/x.gguf"
GENERATE = "generate --checkpoint {here} --max-new-tokens 2"
DEEP = "[" * 200_000

Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """`base` names the good thing of which the case gets a copy, {here}; `spoil` makes it bad."""

    name: str
    base: str
    spoil: Spoil
    arguments: str
    code: int = 1


def write(name: str, content: str | bytes) -> Spoil:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda here: (here / name if here.is_dir() else here).write_bytes(data)


def remove(*patterns: str) -> Spoil:
    return lambda here: [path.unlink() for pattern in patterns for path in here.glob(pattern)]


def keys(name: str, value: Any, *path: str | int) -> Spoil:
    """Sets the entry at `path` of a JSON or YAML file."""

    def spoil(here: Path) -> None:
        file = here / name
        whole = inner = yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else json.loads(file.read_text())
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        file.write_text(json.dumps(whole))  # which is YAML too

    return spoil


def edit(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda here: (here / name).write_bytes(change((here / name).read_bytes()))


def folder(name: str) -> Spoil:
    def spoil(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        (here / name).mkdir()

    return spoil


def nothing(_here: Path) -> None: ...


# What config.json says: every field of the first list with every odd value, but for those that are no fault.
ODD: dict[str, Any] = {
    "text": "x", "minus": -1, "half": 1.5, "list": [1, 2], "object": {"a": 1}, "huge": 10**7, "beyond": 10**30,
    "nan": float("nan"), "true": True, "zero": 0, "surrogate": "\ud800",
}  # fmt: skip
SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size"]  # fmt: skip
OTHERS = ["model_type", "rope_parameters", "hidden_act", "rms_norm_eps", "dtype", "torch_dtype", "flap",
          "quantization_config", "_attn_implementation", "max_position_embeddings", "attention_bias",
          "tie_word_embeddings", "architectures", "layer_types"]  # fmt: skip
FINE = {  # what transformers takes as a default or as it is, and what nothing reads
    "architectures": list(ODD), "max_position_embeddings": ["huge", "beyond"], "rms_norm_eps": ["half"],
    "rope_parameters": ["object"], "_attn_implementation": ["object"],
}  # fmt: skip


CONFIGS: dict[str, str | bytes] = {
    "empty": "", "list": "[]", "null": "null", "number": "3", "text": '"x"', "object": "{}", "cut": '{"a": ',
    "deep": DEEP, "lfs": LFS, "utf-16": "{}".encode("utf-16-be"), "bytes": b"\xff\xfe\x00", "zeros": bytes(100),
    "digits": '{"hidden_size": ' + "9" * 5000 + "}",
}  # fmt: skip


def config_cases() -> Iterator[Case]:
    for name in SIZES + OTHERS:
        for kind, value in ODD.items():
            code = 0 if kind in FINE.get(name, ()) else 1
            for way in (IN_MEMORY, STREAMED) if name in OTHERS else (CALIBRATE,):
                spoil = keys("config.json", value, name)
                yield Case(f"config {name} {kind} {way.split()[-1]}", "model", spoil, way, code)
    for kind, content in CONFIGS.items():
        for command in (IN_MEMORY, EVAL, EXPORT, "show {here}"):
            yield Case(f"config.json {kind} {command.split()[0]}", "model", write("config.json", content), command)
    yield Case("config.json is a folder", "model", folder("config.json"), CALIBRATE)
    yield Case("config.json is missing", "model", remove("config.json"), CALIBRATE)


SHARD_NAMES: dict[str, Any] = {
    "number": 1, "above": "../../x.safetensors", "absolute": "/etc/passwd", "empty": "", "dot": ".", "up": "..",
    "null byte": "a\0b", "long": "x" * 5000, "surrogate": "\ud800", "object": {"a": "b"}, "list": ["a"], "null": None,
    "missing": "model-9.safetensors", "config": "config.json", "backslash": "..\\x.bin", "true": True,
}  # fmt: skip
MAPS: dict[str, Any] = {"empty": {}, "list": [1], "null": None, "text": "x", "number": 7}
INDICES = {"shards": "model.safetensors.index.json", "bins": "pytorch_model.bin.index.json"}


def index_cases() -> Iterator[Case]:
    for base, index in INDICES.items():
        for kind, value in MAPS.items():
            yield Case(f"{base} weight_map {kind}", base, keys(index, value, "weight_map"), CALIBRATE)
        for kind, value in SHARD_NAMES.items():
            spoil = keys(index, {"model.norm.weight": value}, "weight_map")
            yield Case(f"{base} shard {kind}", base, spoil, CALIBRATE)
        for kind in ("empty", "list", "object", "cut", "deep", "lfs", "bytes"):
            yield Case(f"{base} index {kind}", base, write(index, CONFIGS[kind]), CALIBRATE)
        for pattern in ("*-00001-of*", "*-of-*"):
            yield Case(f"{base} without {pattern}", base, remove(pattern), CALIBRATE)


def header(raw: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<Q", len(raw)) + raw + tail


def tensor(**changed: Any) -> bytes:
    """A header of one tensor, and its bytes."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed
    return header(json.dumps({"model.norm.weight": entry}).encode(), bytes(8))


SAFETENSORS = {
    "empty": b"", "short": b"abc", "length": struct.pack("<Q", 2**62) + b"{}", "no header": struct.pack("<Q", 0),
    "lfs": LFS.encode(), "deep": header(DEEP.encode()), "deep objects": header(b'{"a":' * 100_000),
    "list": header(b"[]"), "null": header(b"null"), "bytes": header(b"\xff\xfe"), "nothing": header(b"{}"),
    "metadata list": header(b'{"__metadata__": [1]}'), "entry list": header(b'{"a": [1]}'),
    "entry": header(b'{"a": {}}'),
    "shape text": tensor(shape="x"), "shape negative": tensor(shape=[-2]), "shape half": tensor(shape=[2.0]),
    "shape nested": tensor(shape=[[2]]), "shape true": tensor(shape=[True, 2]),
    "shape huge": tensor(shape=[10**12, 10**12]),
    "shape digits": header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 6000 + b'], "data_offsets": [0, 4]}}'),
    "dtype odd": tensor(dtype="X9"), "dtype list": tensor(dtype=[1]), "dtype null": tensor(dtype=None),
    "offsets one": tensor(data_offsets=[0]), "offsets text": tensor(data_offsets="ab"),
    "offsets negative": tensor(data_offsets=[-8, 0]), "offsets beyond": tensor(data_offsets=[8, 16]),
    "offsets half": tensor(data_offsets=[0.0, 8.0]), "offsets nan": tensor(data_offsets=[float("nan"), 8]),
    "float8": tensor(dtype="F8_E4M3", shape=[8]),
}  # fmt: skip


def weight_cases() -> Iterator[Case]:
    for kind, content in SAFETENSORS.items():
        yield Case(f"safetensors {kind}", "model", write("model.safetensors", content), CALIBRATE)
        yield Case(f"stats as {kind}", "run", write("stats.safetensors", content), "plan -d {here}")
    for share in (0, 7, 9, 1000, -1):
        cut = edit("model.safetensors", lambda data, share=share: data[:share])
        yield Case(f"safetensors cut at {share}", "model", cut, EVAL)
    yield Case("safetensors a folder", "model", folder("model.safetensors"), CALIBRATE)
    yield Case("no weights", "model", remove("*.safetensors"), CALIBRATE)
    for kind, made in BINS.items():
        yield Case(f"bin {kind}", "bin", lambda here, made=made: made(here / "pytorch_model.bin"), CALIBRATE)


class Whole(torch.nn.Module):
    """A module that is pickled whole."""


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (99,)  # which the exit code would tell


BINS: dict[str, Callable[[Path], object]] = {
    "whole model": lambda path: torch.save(Whole(), path),
    "list": lambda path: torch.save([torch.zeros(2)], path),
    "number": lambda path: torch.save(7, path),
    "nested": lambda path: torch.save({"model": {"a": torch.zeros(2)}}, path),
    "odd names": lambda path: torch.save({1: torch.zeros(2)}, path),
    "no tensors": lambda path: torch.save({}, path),
    "sparse": lambda path: torch.save({"model.norm.weight": torch.eye(4).to_sparse()}, path),
    "integers": lambda path: torch.save({"model.norm.weight": torch.zeros(48, dtype=torch.int64)}, path),
    "complex": lambda path: torch.save({"model.norm.weight": torch.zeros(48, dtype=torch.complex64)}, path),
    "quantised": lambda path: torch.save({"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, path),
    "code": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "code in a zip": lambda path: torch.save(Evil(), path),
    "old format": lambda path: torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False),
    "lfs": lambda path: path.write_text(LFS),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "scrambled": lambda path: path.write_bytes(path.read_bytes().replace(b"model.norm", b"model\xff\xfe\xfdorm")),
    "other zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(*pairs: bytes, tensors: int = 0, tail: bytes = bytes(64), version: int = 3, count: int | None = None) -> bytes:
    head = struct.pack("<IQQ", version, tensors, len(pairs) if count is None else count)
    return b"GGUF" + head + b"".join(pairs) + tail


LLAMA = pair(b"general.architecture", 8, text(b"llama"))
GGUFS = {
    "empty": b"", "magic": b"GGUF", "lfs": LFS.encode(), "other": b"GGML" + bytes(100), "version 1": gguf(version=1),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "nothing": gguf(), "many pairs": gguf(count=2**60),
    "many tensors": gguf(tensors=2**60), "nested": gguf(pair(b"a", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "array": gguf(pair(b"a", 9, struct.pack("<IQ", 4, 2**60))), "string": gguf(pair(b"a", 8, struct.pack("<Q", 2**62))),
    "type": gguf(pair(b"a", 99, b"")), "inner type": gguf(pair(b"a", 9, struct.pack("<IQ", 99, 1))),
    "alignment 0": gguf(pair(b"general.alignment", 4, bytes(4))), "key bytes": gguf(pair(b"\xff\xfe", 4, bytes(4))),
    "text bytes": gguf(pair(b"a", 8, text(b"\xff\xfe"))),
    "architecture": gguf(pair(b"general.architecture", 8, text(b"abc"))),
    "architecture number": gguf(pair(b"general.architecture", 4, bytes(4))), "llama alone": gguf(LLAMA),
    "lora": gguf(LLAMA, pair(b"general.type", 8, text(b"adapter")), pair(b"adapter.type", 8, text(b"lora"))),
    "split": gguf(LLAMA, pair(b"split.no", 2, bytes(2)), pair(b"split.count", 2, b"\x03\0")),
    "no layers": gguf(LLAMA, pair(b"llama.block_count", 4, bytes(4))),
    "layers text": gguf(LLAMA, pair(b"llama.block_count", 8, text(b"x"))),
    "layers huge": gguf(LLAMA, pair(b"llama.block_count", 4, b"\xff" * 4)),
    "dimensions": gguf(LLAMA, tensors=1, tail=text(b"token_embd.weight") + struct.pack("<I", 2**31)),
    "tensor type": gguf(LLAMA, tensors=1, tail=text(b"a") + struct.pack("<IQIQ", 1, 4, 999, 0) + bytes(64)),
    "tensor huge": gguf(LLAMA, tensors=1,
    tail=text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    "offset": gguf(LLAMA, tensors=1, tail=text(b"token_embd.weight") + struct.pack("<IQIQ", 1, 4, 0, 2**60)),
}  # fmt: skip


def swap(old: bytes, new: bytes) -> Spoil:
    """Replaces bytes of a GGUF by as many others."""

    def spoil(here: Path) -> None:
        assert len(old) == len(new) and old in here.read_bytes()
        here.write_bytes(here.read_bytes().replace(old, new))

    return spoil


def number(key: bytes, value: int) -> Spoil:
    """Changes a number of 32 bits in the metadata of a GGUF."""

    def spoil(here: Path) -> None:
        data = here.read_bytes()
        place = data.index(text(key)) + 8 + len(key) + 4
        here.write_bytes(data[:place] + struct.pack("<I", value) + data[place + 4 :])

    return spoil


GGUF_SIZES = ["block_count", "embedding_length", "feed_forward_length", "attention.head_count",
              "attention.head_count_kv"]  # fmt: skip


def gguf_cases() -> Iterator[Case]:
    for kind, content in GGUFS.items():
        yield Case(f"gguf {kind}", "gguf", write("", content), CALIBRATE)
    for key, value in product(GGUF_SIZES, (0, 1, 5, 10**6, 2**32 - 1)):
        yield Case(f"gguf {key} {value}", "gguf", number(f"llama.{key}".encode(), value), CALIBRATE)
    for name, code in {"tokens": 1, "model": 1, "merges": 1, "token_type": 0}.items():  # types are not needed
        old = f"tokenizer.ggml.{name}".encode()
        yield Case(f"gguf without {name}", "gguf", swap(old, old[:-3] + b"abc"), CALIBRATE, code)
    yield Case("gguf tokenizer of another kind", "gguf", swap(text(b"gpt2"), text(b"bert")), CALIBRATE)
    yield Case("gguf without tokenizer", "bare", nothing, CALIBRATE)
    yield Case("gguf unknown tensor", "gguf", swap(b"blk.1.attn_norm", b"blk.1.attn_form"), CALIBRATE)
    yield Case("gguf tensor twice", "gguf", swap(b"blk.1.attn_norm", b"blk.0.attn_norm"), CALIBRATE)
    yield Case("gguf cut", "gguf", lambda here: here.write_bytes(here.read_bytes()[:-5000]), CALIBRATE)


LARGER = keys("tokenizer.json", 5000, "model", "vocab", ";")
RAISES = "{{ raise_exception('no system') }}"
TOKENIZERS: dict[str, tuple[Spoil, str, int]] = {
    "none": (remove("*token*"), CALIBRATE, 1),
    "lfs": (write("tokenizer.json", LFS), CALIBRATE, 1),
    "empty": (write("tokenizer.json", ""), CALIBRATE, 1),
    "object": (write("tokenizer.json", "{}"), CALIBRATE, 1),
    "deep": (write("tokenizer.json", DEEP), CALIBRATE, 1),
    "bytes": (write("tokenizer.json", b"\xff\xfe"), CALIBRATE, 1),
    "no model": (keys("tokenizer.json", None, "model"), CALIBRATE, 1),
    "odd merges": (keys("tokenizer.json", [1], "model", "merges"), CALIBRATE, 1),
    "vocabulary list": (keys("tokenizer.json", [], "model", "vocab"), CALIBRATE, 1),
    "configuration list": (write("tokenizer_config.json", "[]"), CALIBRATE, 1),
    "configuration cut": (write("tokenizer_config.json", "{"), CALIBRATE, 1),
    "class unknown": (keys("tokenizer_config.json", "NoSuchTokenizer", "tokenizer_class"), CALIBRATE, 0),
    "class number": (keys("tokenizer_config.json", 7, "tokenizer_class"), CALIBRATE, 1),
    "code of its own": (
        keys("tokenizer_config.json", {"AutoTokenizer": ["x.Y", None]}, "auto_map"), CALIBRATE, 0),
    "sentencepiece lfs": (
        lambda here: (remove("tokenizer*")(here), write("tokenizer.model", LFS)(here)), CALIBRATE, 1),
    "larger than the embedding": (LARGER, IN_MEMORY, 1),
    "larger, streamed": (LARGER, STREAMED, 1),
    "larger, eval": (LARGER, EVAL, 1),
    "larger, eval streamed": (LARGER, f"{EVAL} --stream", 1),
    "larger, generate": (LARGER, f"{GENERATE} ;", 1),
    "template raises": (
        write("chat_template.jinja", RAISES),
        f"{GENERATE} Hi --chat", 1),
    "template broken": (
        write("chat_template.jinja", "{% if %}"),
        f"{GENERATE} Hi --chat", 1),
    "no template": (nothing, f"{GENERATE} Hi --chat", 1),
    "template bytes": (write("chat_template.jinja", b"\xff\xfe"), CALIBRATE, 1),
    "export lfs": (write("tokenizer.json", LFS), EXPORT, 1),
    "export none": (remove("*token*"), EXPORT, 1),
    "generate none": (remove("*token*"), f"{GENERATE} Hi", 1),
}  # fmt: skip


GENERATIONS: dict[str, str | bytes] = {
    "cut": "{", "list": "[]", "empty": "", "deep": DEEP, "bytes": b"\xff\xfe", "number": "7", "lfs": LFS,
    "temperature": '{"temperature": "x"}', "eos": '{"eos_token_id": "x"}', "eos list": '{"eos_token_id": [1, "x"]}',
}  # fmt: skip
CARDS = {"bomb": f"{BOMB}license: *j", "list": "license: [a]", "number": "7", "deep": DEEP, "none": ""}


def companion_cases() -> Iterator[Case]:
    for kind, (spoil, command, code) in TOKENIZERS.items():
        yield Case(f"tokenizer {kind}", "model", spoil, command, code)
    for kind, content in GENERATIONS.items():
        spoil, code = write("generation_config.json", content), 0 if kind == "temperature" else 1  # flap sets its own
        for command in (CALIBRATE, EXPORT, EVAL, f"{GENERATE} Hi"):
            yield Case(f"generation_config {kind}, {command.split()[0]}", "model", spoil, command, code)
        inside = write("pruned/generation_config.json", content)
        yield Case(f"generation_config {kind}, pruned", "run", inside, "export gguf -d {here} -o {out}/x.gguf", code)
    for kind, metadata in CARDS.items():
        spoil = write("README.md", f"---\n{metadata}\n---\nA model.")
        command = f"run {{here}} -d {{out}} {SMALL} --perplexity {{text}} --no-baseline"
        yield Case(f"README {kind}", "model", spoil, command, 0)
    yield Case("adapter", "model", write("adapter_config.json", "{}"), CALIBRATE)


TEXTS: dict[str, tuple[str, str | bytes, int]] = {
    "empty": (".txt", "", 1), "short": (".txt", "x", 1), "bytes": (".txt", b"\xff\xfe\xfd" * 100, 1),
    "nul": (".txt", bytes(5000), 0), "bom": (".txt", "\ufeff" + TEXT, 0), "spaces": (".txt", " " * 9000, 0),
    "jsonl empty": (".jsonl", "", 1), "jsonl bytes": (".jsonl", b"\xff\xfe", 1),
    "jsonl words": (".jsonl", "no json", 1),
    "jsonl list": (".jsonl", "[1]", 1), "jsonl number": (".jsonl", "7", 1), "jsonl text": (".jsonl", '"text"', 1),
    "jsonl other column": (".jsonl", '{"a": "b"}', 1), "jsonl of numbers": (".jsonl", '{"text": 7}', 1),
    "jsonl of objects": (".jsonl", '{"text": {"a": 1}}', 1), "jsonl of lists": (".jsonl", '{"text": ["a"]}', 1),
    "jsonl nulls": (".jsonl", '{"text": null}\n' * 9, 1), "jsonl surrogate": (".jsonl", '{"text": "\\ud800"}', 1),
    "jsonl deep": (".jsonl", DEEP, 1), "jsonl chat": (".jsonl", '{"text": [{"role": "user", "content": "Hi"}]}', 1),
    "jsonl chat of numbers": (".jsonl", '{"text": [{"role": 1, "content": 2}]}', 1),
    "jsonl cut": (".jsonl", '{"text": "abc', 1), "jsonl lfs": (".jsonl", LFS, 1),
    "jsonl bom": (".jsonl", "\ufeff" + json.dumps({"text": TEXT}), 0), "jsonl digits": (".jsonl", "9" * 5000, 1),
    "parquet empty": (".parquet", "", 1), "parquet words": (".parquet", "PAR1 and no more", 1),
    "parquet lfs": (".parquet", LFS, 1), "parquet cut": (".parquet", b"PAR1" + bytes(100) + b"PAR1", 1),
}  # fmt: skip


def text_cases() -> Iterator[Case]:
    for kind, (suffix, content, code) in TEXTS.items():

        def spoil(here: Path, suffix: str = suffix, content: str | bytes = content) -> None:
            write("", content)(here)
            here.rename(here.with_name(f"here{suffix}"))

        for command in ("calibrate {model} -d {out} --dataset {here}%s --seqlen 16 --nsamples 4",
                        "eval {model} -o {out}/e.json --perplexity {here}%s --seqlen 16"):  # fmt: skip
            yield Case(f"text {kind}, {command[:4]}", "text", spoil, command % suffix, code)
    for where in (
        "{out}",
        "{out}.txt",
        "{good}",
        "{text}/x.txt",
        f"{'x' * 300}.txt",
        "{text}:nan",
        "{text}:0",
        "self:-1",
        "",
    ):
        yield Case(f"--dataset {where[:20]}", "text", nothing, f"calibrate {{model}} -d {{out}} --dataset '{where}'", 2)


WHOLE: dict[str, str | bytes] = {
    "empty": "", "list": "[]", "null": "null", "number": "7", "deep": DEEP, "bytes": b"\xff\xfe\x00", "lfs": LFS,
    "bomb": BOMB, "bomb in the format": f"format: flap-plan/1\n{BOMB}", "tag": "!!python/object:os.system [ls]",
    "cut": "format: [", "anchor": "*a", "merge": "<<: *a", "loop": "a: &a [*a]", "tabs": "\t- a", "nul": bytes(9),
    "date": "format: 2020-99-99", "hex": "format: 0x", "sexagesimal": "1:99:99", "alone": "format: flap-plan/1",
    "keys": "? {a: 1}\n: b", "list as a key": "? [a]\n: b", "json": '{"format": "flap-eval/1"}',
    "sweep": '{"format": "flap-sweep/1"}', "self": '{"format": "flap-self/1"}', "digits": "9" * 5000,
    "infinite": '{"format": "flap-eval/1", "perplexity": {"a": Infinity}}',
}  # fmt: skip
READ_BY = {
    "plan.yaml": ("apply -d {here}", "diff {here} {run}", "report -d {here} -o {out}/r.html"),
    "eval.json": ("show {here}", "compare {here} {run}", "report -d {here} -o {out}/r.html"),
    "sweep.json": ("show {here}/sweep.json",),
    "self.json": ("show {here}/self.json",),
    "pruned/config.json": ("show {here}", "export gguf -d {here}", "push a/b -d {here}"),
    "pruned/plan.yaml": ("push a/b -d {here}",),
}


ODD_ENTRY: dict[str, Any] = {
    "text": "x", "minus": -7, "list": [1], "object": {"a": 1}, "null": None, "huge": 10**30, "nan": float("nan"),
}  # fmt: skip
REPORT = "report -d {here} -o {out}/r.html --compare {run}"
# Entries of artifacts, with the odd values that are no fault there, and the commands that read them.
ENTRIES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "plan.yaml": (("apply -d {here} --force",), {
        "format": "", "model": "", "model.name": "", "stats": "", "stats.path": "", "settings": "object", "ratio": "",
        "parameters": "", "parameters.per_unit": "", "layers": "", "layers.0": "", "layers.0.index": "",
        "layers.0.mlp": "", "layers.0.mlp.of": "", "layers.0.mlp.keep": "", "layers.0.attention.unit": "",
        "parameters.model": "", "parameters.per_unit.mlp.weights": "", "extra": "",
    }),
    "eval.json": (("compare {here} {run}", REPORT), {
        "checkpoint": "text", "perplexity": "object", "size": "", "size.parameters": "minus huge",
        "settings": "object", "tasks": "", "baseline": "null", "versions": "", "speed": "null object", "speedup": "",
        "averaged_tasks": "", "baseline.perplexity": "object",
    }),
    "sweep.json": (("show {here}/sweep.json",), {
        "rows": "", "rows.0": "", "rows.0.perplexity": "", "rows.0.ratio": "minus huge nan", "dense": "null",
        "settings": "object", "dense.perplexity": "",
    }),
}  # fmt: skip
KEEPS = [
    "5-2",
    "0-99",
    "0,0",
    "all",
    "-1",
    "0--3",
    "0-9999999999",
    "\u0663",
    "0-100000000",
    "1," * 90_000,
    "0x1",
    "1.5",
]


def artifact_cases() -> Iterator[Case]:
    """Artifacts with one entry that is odd, or as a whole something else."""
    for file, (commands, entries) in ENTRIES.items():
        for (entry, fine), (kind, value), command in product(entries.items(), ODD_ENTRY.items(), commands):
            path = [int(step) if step.isdigit() else step for step in entry.split(".")]
            name, code = f"{file} {entry} {kind}, {command.split()[0]}", 0 if kind in fine.split() else 1
            yield Case(name, "run", keys(file, value, *path), command, code)
    for keep in KEEPS:
        spoil = keys("plan.yaml", keep, "layers", 0, "mlp", "keep")
        yield Case(f"plan keep {keep[:9]}", "run", spoil, "apply -d {here}")
    for (kind, content), (file, commands) in product(WHOLE.items(), READ_BY.items()):
        for command in commands:
            yield Case(f"{file} {kind}, {command.split()[0]}", "run", write(file, content), command)
    for size in ("num_layers", "hidden_size", "head_dim", "num_key_value_heads"):
        for value in (b"0", b"-1", b"99", b"9" * 30):
            old = b'\\"%s\\":' % size.encode()

            def change(data: bytes, old: bytes = old, value: bytes = value) -> bytes:
                length = struct.unpack("<Q", data[:8])[0]
                head, _, rest = data[8 : 8 + length].partition(old)
                digits = len(rest) - len(rest.lstrip(b"0123456789"))
                return header(head + old + value + rest[digits:], data[8 + length :])

            name, spoil = f"stats {size} {value[:4].decode()}", edit("stats.safetensors", change)
            yield Case(name, "run", spoil, "plan -d {here}", 0 if name == "stats hidden_size 99" else 1)


IS_2 = {  # options that are misuse, after what stands before them
    "calibrate {model}": """--nsamples 0|--nsamples x|--nsamples 1000000000000|--seqlen 1|--seqlen 100000|--seed x
        --batch-size 0|--batch-size ²|--batch-size -1|--device nowhere|--device cuda:x|--dtype int4|--preset none
        --gram-dtype int8|--dataset nothing|--activation-memory x|--activation-memory -1GB|--activation-memory nan
        --device-map everywhere|--stream --device-map auto|--rank-timeout 1|--nowhere|extra arguments
        --activation-memory 1e999GB|--activation-memory ²GB""",
    "plan -d {here}": """--ratio 1|--ratio -1|--ratio nan|--ratio inf|--ratio x|--method none|--metric none
        --structure none|--remove-heads -1|--remove-heads 3|--round-to 0|--round-to 1000|--heads-multiple-of 0
        --heads-multiple-of 99|--attention-exponent nan|--attention-exponent 0|--attention-exponent 1e300
        --target-params x|--target-params 0|--target-params 1|--target-size x|--target-size -1|--target-size 1KB
        --target-size 1GB --ratio 0.1|--target-params ²M|--target-params 1e9|--dtype float32|--target-biases
        --ratio 0.99999|--structure AL-MM --remove-heads 999""",
    "apply -d {here}": """--compensate none --ridge 1|--ridge -1 --compensate lstsq|--ridge nan --compensate lstsq
        --ridge inf --compensate lstsq|--sequential|--compensate x|--max-shard-size x|--max-shard-size 0|--dtype int8
        --max-shard-size 1e400GB|--remote-code no|--mask-only --compensate none --bias|--max-shard-size nan""",
    "eval {model} -o {out}/e.json": """--perplexity nothing|--perplexity {here}|--seqlen 1|--seqlen 0|--tasks nosuchtask
        --tasks ''|--tasks ,|--limit 5|--limit 0|--num-fewshot 2|--num-fewshot -1 --tasks boolq|--speed-rounds 2
        --speed --speed-lengths x|--speed --speed-batch-sizes 0|--speed --speed-new-tokens 0|--threads 0
        --stream --speed|--cache-requests|--include-path {out}|--include-path {out} --tasks nosuch""",
    "eval {model} --perplexity {text} -o {out}/e.json": """--seqlen 100000|--speed --speed-lengths 100000
        --device tpu|--batch-size two""",
    "sweep {model} -d {out}": "--ratios x|--ratios 1|--ratios ,|--ratios nan|--ratios -0.1|--ratios ''|--tasks nosuch",
    "run {model} -d {out} --dataset {text} --nsamples 4 --seqlen 16": """--ratio 2|--target-size 1KB --mask-only
        --target-params 10|--preset best --method mag-sp|--tasks nosuch""",
    "generate Hi -d {here}": """--max-new-tokens 0|--temperature 1|--temperature nan --sample
        --temperature inf --sample|--sample --temperature 0|--device x""",
    "export": "onnx -d {here}|gguf -d {here} --outtype q2|gguf a b c", "compare": "{here}", "families": "x",
    "diff": "{here}|{here} {here} {here}", "show": "{here} --plot {out}/x.gif|{here} {here}", "push": "|a/b c d",
    "nocommand": "|--x",
}  # fmt: skip


def option_cases() -> Iterator[Case]:
    for command, options in IS_2.items():
        for option in options.replace("\n", "|").split("|"):
            yield Case(f"{command.split()[0]} {option.strip()}", "run", nothing, f"{command} {option}", 2)


MADE = {  # commands that write, but for the place
    "calibrate {model} --dataset {text} --seqlen 16 --nsamples 4 -o": "stats.safetensors",
    "plan -d {run} -o": "plan.yaml",
    "apply -d {run} -o": "pruned", "eval {model} --perplexity {text} --seqlen 16 -o": "eval.json",
    "export gguf {run}/pruned -o": "x.gguf", "report -d {run} -o": "r.html",
}  # fmt: skip


def place_cases() -> Iterator[Case]:
    for command, name in MADE.items():
        short = command.split()[0]
        places = {
            "below a file": f"{{text}}/{name}", "by a long name": f"{{out}}/{'x' * 300}{name}",
            "where nobody may write": f"/proc/nowhere/{name}", "to a broken link": "{here}/link",
            "over weights": "{here}/pruned/model-00001-of-00001.safetensors",
        }  # fmt: skip
        if short != "apply":
            other = "eval.json" if short == "plan" else "plan.yaml"
            places |= {"into a folder": "{here}", "over a file": "{here}/mine", f"over {other}": f"{{here}}/{other}"}
        for kind, place in places.items():
            for force in [""] if short == "report" else ["", " --force"]:
                yield Case(f"{short} {kind}{force}", "run", mine, f"{command} {place}{force}")
    for place in ("{here}/x.png", "{text}/x.png", "{here}/mine.png", "/proc/nowhere/x.png"):
        yield Case(f"show --plot {place}", "run", mine, f"show {{run}} --plot {place}")
    with_text = f"{{model}} {SMALL} --perplexity {{text}}"
    for command in (f"run {with_text}", f"sweep {with_text}", "plan", "apply", "eval"):
        for kind, place in {"file": "{text}", "below a file": "{text}/x", "long": "x" * 300, "none": "/proc/x"}.items():
            yield Case(f"{command.split()[0]} -d {kind}", "run", nothing, f"{command} -d {place}")
    reads = {
        "stats.safetensors": "plan -d {here}", "plan.yaml": "apply -d {here}", "eval.json": "compare {here} {run}",
        "sweep.json": "show {here}/sweep.json", "self.json": "show {here}/self.json",
    }  # fmt: skip
    for name, command in reads.items():
        yield Case(f"{name} is a folder", "run", folder(name), command)
    for model in ("{text}", "{text}/x", "/nowhere", "./none", "a/b/c", "not a model!", "{out}/x.gguf", "x" * 300):
        yield Case(f"model {model[:10]!r}", "run", nothing, f"calibrate '{model}' -d {{out}} {SMALL}")


def mine(here: Path) -> None:
    (here / "link").symlink_to("/proc/x/y")
    (here / "x.png").mkdir()
    for name in ("mine", "mine.png"):
        (here / name).write_text("mine")


def all_cases() -> Iterator[Case]:
    for cases in (config_cases, index_cases, weight_cases, gguf_cases, companion_cases, text_cases, artifact_cases,
                  option_cases, place_cases):  # fmt: skip
        yield from cases()


@dataclass
class Score:
    """Names of the cases that went wrong, by how."""

    wrong: dict[str, list[str]] = field(default_factory=lambda: {
        kind: [] for kind in ("tracebacks", '"unexpected"', "wrong exit codes", "more than one error line",
                              "files destroyed", "memory over 1 GB")
    })  # fmt: skip

    def add(self, case: Case, code: int, said: str, destroyed: list[str], grown: int) -> bool:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        found = {
            "tracebacks": "Traceback" in said, '"unexpected"': "error: unexpected" in said,
            "wrong exit codes": code != case.code, "more than one error line": code == 1 and len(errors) != 1,
            "files destroyed": bool(destroyed), "memory over 1 GB": grown > 10**9,
        }  # fmt: skip
        for kind, is_so in found.items():
            if is_so:
                self.wrong[kind].append(case.name)
        return any(found.values())


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def prepare(good: Path) -> dict[str, str]:
    """The good things that cases spoil; returns what arguments name them by."""
    (good / "text").write_text(TEXT)
    shutil.copy(good / "text", good / "text.txt")
    model = make_tiny(good / "model", "llama-gqa")
    make_tiny(good / "shards", "llama-gqa", shard="100KB")
    to_bin(make_tiny(good / "bin", "llama-gqa"))
    to_bin(make_tiny(good / "bins", "llama-gqa"), shards=3)
    write_gguf(good / "gguf", model, vocabulary=True)
    write_gguf(good / "bare", model)
    names = {"model": f"{model}", "text": f"{good}/text.txt", "run": f"{good}/run", "good": f"{good}"}
    for command in (f"sweep {{model}} -d {{run}} {SMALL} --ratios 0.3 --perplexity {{text}}",
    "plan -d {run} --ratio 0.3",
                    "apply -d {run}", "eval -d {run} --perplexity {text} --seqlen 16"):  # fmt: skip
        code, said, _ = run(command, names, good)
        assert code == 0, said
    return names


def run(command: str, names: dict[str, str], place: Path) -> tuple[int, str, int]:
    """Exit code, all that was said, and by how much the process grew at most."""
    import shlex

    arguments = [part.format_map(names) for part in shlex.split(command)]
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    child = start(arguments, {"HF_HUB_OFFLINE": "1"}, place / "stdout", place / "stderr")
    _, status, usage = os.wait4(child, 0)
    said = "".join((place / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return os.waitstatus_to_exitcode(status), said, 1024 * usage.ru_maxrss - before


def try_case(case: Case, good: Path, names: dict[str, str], score: Score) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        is_gguf = case.base in ("gguf", "bare")
        here = place / "work" / ("here.gguf" if is_gguf else "here")
        here.parent.mkdir()
        (shutil.copytree if (good / case.base).is_dir() else shutil.copy)(good / case.base, here)
        case.spoil(here)
        before = contents(here.parent)
        code, said, grown = run(case.arguments, names | {"here": str(here), "out": str(place / "out")}, place)
        after = contents(here.parent)
        destroyed = [path for path, data in before.items() if after.get(path) != data] if code else []
        if score.add(case, code, said, destroyed, grown):
            print(
                f"{case.name}: exit {code}, {grown / 1e6:.0f} MB, {destroyed} {' '.join(said.split())[-300:]}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    limit = 12 * GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    cases = [case for case in all_cases() if not asked.parts or any(part in case.name for part in asked.parts)]
    score = Score()
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch)
        names = prepare(good)
        before = contents(good)
        for case in cases:
            try_case(case, good, names, score)
        score.wrong["files destroyed"] += [p for p, data in before.items() if contents(good).get(p) != data]
    print(f"cases: {len(cases)}")
    for kind, found in score.wrong.items():
        print(f"{kind}: {len(found)}")
    sys.exit(any(score.wrong.values()))


if __name__ == "__main__":
    main()
