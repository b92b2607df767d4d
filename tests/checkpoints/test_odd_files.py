"""Broken and hostile files of a checkpoint, and options that are none: one line, exit 1 or 2."""

import json
import struct

import pytest
import torch
from support.gguf_files import write_gguf
from support.models import make_tiny

from flapcli.checkpoints import open_checkpoint


@pytest.fixture
def model(tmp_path):
    return make_tiny(tmp_path / "model", "llama-gqa")


def refused(flap, model, text_file, *more, code=1):
    options = ("--dataset", text_file, "--seqlen", 16, "--nsamples", 4, "-d", model.parent / "run")
    said = flap("calibrate", model, *options, *more, code=code).stderr
    assert said.startswith("error: ")
    assert "unexpected" not in said
    assert not (model.parent / "run").exists() or not any((model.parent / "run").iterdir())
    return " ".join(said.split())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_hidden_layers", 10_000_000, "num_hidden_layers is 10000000"),
        ("num_hidden_layers", "x", "num_hidden_layers is 'x'"),
        ("hidden_size", "x", "hidden_size is 'x', where a whole number is wanted"),
        ("hidden_size", 1.5, "hidden_size is 1.5"),
        ("intermediate_size", [1, 2], "intermediate_size is [1, 2]"),
        ("num_key_value_heads", -1, "num_key_value_heads is -1"),
        ("rope_parameters", "x", "rope_parameters"),
        ("_attn_implementation", "flash_attention_2", "FlashAttention2"),
        ("dtype", "float9", "float9"),
        ("flap", [1], "flap-checkpoint/1"),
    ],
)
def test_odd_values_in_config_json(field, value, words, model, text_file, flap):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert words in refused(flap, model, text_file, "--no-stream")


def test_deep_json(model, text_file, flap):
    deep = b"[" * 200_000
    weights = next(model.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(struct.pack("<Q", len(deep)) + deep)
    assert "its header can't be read" in refused(flap, model, text_file)
    weights.write_bytes(whole)
    (model / "config.json").write_bytes(deep)
    assert "can't be read as JSON" in refused(flap, model, text_file)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "there is none: put the model's tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json can't be read (Expecting property name"),
        ("tokenizer.json", "[]", "(read from tokenizer.json, tokenizer_config.json)"),
    ],
)
def test_a_tokenizer_that_is_missing_or_broken_is_named(name, content, words, model, text_file, flap):
    (model / name).unlink()
    if content:
        (model / name).write_text(content)
    said = refused(flap, model, text_file)
    assert "its tokenizer can't be loaded: " in said and words in said


def test_a_tokenizer_configuration_that_is_no_object(model, text_file, flap):
    (model / "tokenizer_config.json").write_text("[]")
    assert "its tokenizer can't be loaded" in refused(flap, model, text_file)


def test_odd_options(model, text_file, flap):
    assert "--batch-size" in refused(flap, model, text_file, "--batch-size", "\u00b2", code=2)
    assert "--nsamples" in refused(flap, model, text_file, "--nsamples", 10**12, code=2)
    said = flap("calibrate", model, "--dataset", text_file, "-d", model.parent / ("x" * 300), code=1).stderr
    assert "File name too long" in said
    assert "unexpected" not in said


def pair(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "pairs",
    [
        [pair(b"a", 9, struct.pack("<IQ", 9, 1) * 5000)],
        [pair(b"a", 9, struct.pack("<IQ", 4, 2**60))],
        [pair(b"a", 8, struct.pack("<Q", 2**62))],
        [pair(b"a", 99, b"")],
        [pair(b"general.alignment", 4, struct.pack("<I", 0))],
        [pair(b"general.alignment", 8, struct.pack("<Q", 2) + b"32")],
    ],
    ids=["arrays of arrays", "array past the end", "string past the end", "no type", "alignment 0", "alignment text"],
)
def test_hostile_gguf_headers(pairs, tmp_path, text_file, flap):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs) + bytes(64))
    assert "its GGUF header can't be read" in refused(flap, path, text_file)


@pytest.mark.parametrize(
    ("field", "value", "way", "words"),
    [
        ("vocab_size", 10**7, "--no-stream", "has shape [320, 48], expected [10000000, 48]"),
        ("vocab_size", 0, "--stream", "vocab_size in config.json is 0"),
        ("torch_dtype", 7, "--no-stream", "torch_dtype in config.json is 7"),
        ("dtype", 1.5, "--no-stream", "dtype in config.json is 1.5"),
        ("max_position_embeddings", -1, "--no-stream", "max_position_embeddings in config.json is -1"),
        ("per_layer_config", {"0": {"sliding_window": 4}}, "--stream", "gives single layers settings of their own"),
        ("_attn_implementation", 7, "--stream", "_attn_implementation in config.json is 7"),
    ],
)
def test_settings_that_are_none(field, value, way, words, model, text_file, flap):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert words in refused(flap, model, text_file, way)


NAMES = [7, None, "", "..", "../../x.safetensors", "/etc/passwd", "a\0b", "\ud800", {"a": "b"}, ["a"], "x" * 300]


@pytest.mark.parametrize(
    ("value", "words"),
    [(value, "names no weights") for value in ({}, [1], None, "x")]
    + [({"model.norm.weight": name}, "for 'model.norm.weight', which is no file beside it") for name in NAMES]
    + [({"model.norm.weight": "model-9.bin"}, "lacks model-9.bin, which its ")],
)
@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_indices_that_name_no_files_beside_them(value, words, single, model, text_file, flap):
    (model / "model.safetensors").unlink()
    (model / f"{single}.index.json").write_text(json.dumps({"weight_map": value}))
    said = refused(flap, model, text_file)
    assert words in said
    assert f"{single}.index.json" in said


class Whole(torch.nn.Module):
    """Pickled whole, as torch.save(model) does."""


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Whole(), "holds more than tensors"),
        ([torch.zeros(2)], "holds a list, where tensors by name are wanted"),
        ({"model": {"model.norm.weight": torch.zeros(48)}}, "holds no tensors of a model"),
        ({1: torch.zeros(2)}, "tensor model.embed_tokens.weight is missing"),
        ({"model.norm.weight": torch.zeros(48, dtype=torch.complex64)}, "is torch.complex64, which flap can't read"),
    ],
)
def test_bin_files_of_other_things(made, words, model, text_file, flap):
    (model / "model.safetensors").unlink()
    torch.save(made, model / "pytorch_model.bin")
    assert words in refused(flap, model, text_file)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "pytorch_model.bin"])
def test_pointers_of_git_lfs(name, model, text_file, flap):
    if name.endswith(".bin"):
        (model / "model.safetensors").unlink()
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    assert f"{name} is a Git LFS pointer: fetch the file itself" in refused(flap, model, text_file)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"eos_token_id": "x"}'])
def test_a_broken_generation_config_is_told_before_the_work(content, model, text_file, flap):
    (model / "generation_config.json").write_text(content)
    assert "generation_config.json" in refused(flap, model, text_file)
    out = model.parent / "x.gguf"
    assert "generation_config.json" in flap("export", "gguf", model, "-o", out, code=1).stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# A", "apache-2.0"),
        ("---\ntags: [a]\nlicense:  'llama3.2' # theirs\n---\n", "llama3.2"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("# license: mit\n---\nlicense: mit\n---\n", None),
        ("---\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ) + "license: *i\n---\n", None),
        ("---\n" + "[" * 100_000 + "\nlicense: mit\n---\n", "mit"),
    ],
    ids=["plain", "quoted", "list", "no metadata", "bomb", "deep"],
)  # fmt: skip
def test_a_license_is_read_from_its_line_alone(card, license, model):
    (model / "README.md").write_text(card)
    assert open_checkpoint(model).license == license


@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_a_tokenizer_larger_than_the_embedding(way, model, tmp_path, flap):
    path, text = model / "tokenizer.json", tmp_path / "t.txt"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"][";"] = 5000
    path.write_text(json.dumps(spec))
    text.write_text("the quick brown fox; " * 100)
    words = "its tokenizer gives the id 5000, and its embedding has only 320 rows"
    assert words in refused(flap, model, text, way)
    measured = ("eval", model, "--perplexity", text, "--seqlen", 16, "-o", tmp_path / "e.json", way)
    assert words in flap(*measured, code=1).stderr
    assert words in flap("generate", "a;", "--checkpoint", model, code=1).stderr
    text.write_text("the quick brown fox " * 100)  # what is never read does no harm
    flap(*measured)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system') }}", "{% if %}"])
def test_a_chat_template_that_raises(template, model, flap):
    (model / "chat_template.jinja").write_text(template)
    said = flap("generate", "Hi", "--chat", "--checkpoint", model, code=1).stderr
    assert "the tokenizer's chat template can't lay out the prompt" in said


def test_ggufs_that_are_no_whole_model(model, tmp_path, text_file, flap):
    whole, bad = write_gguf(tmp_path / "whole.gguf", model).read_bytes(), tmp_path / "bad.gguf"
    llama = pair(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")
    adapter = pair(b"general.type", 8, struct.pack("<Q", 7) + b"adapter")
    layers = whole.index(b"llama.block_count") + len(b"llama.block_count") + 4
    heads = whole.index(b"llama.attention.head_count") + len(b"llama.attention.head_count") + 4
    for content, words in (
        (whole, "its tokenizer can't be loaded: the file holds none"),
        (whole[:layers] + b"\xff\xff\0\0" + whole[layers + 4 :], "says 65,535 layers, and it holds 30 tensors"),
        (whole[:heads] + b"\5" + whole[heads + 1 :], "its metadata make no llama"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + llama + adapter + bytes(64), "holds no model but a 'adapter'"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + llama + pair(b"split.count", 2, b"\3\0") + bytes(64),
            "is one of 3 parts",
        ),
    ):
        bad.write_bytes(content)
        assert words in refused(flap, bad, text_file)


def test_a_text_of_no_name_and_deep_json(model, tmp_path, flap):
    assert "--dataset : give wikitext2" in refused(flap, model, "", code=2)
    (tmp_path / "t.jsonl").write_text("[" * 100_000)
    assert "line 1: not a JSON object" in refused(flap, model, tmp_path / "t.jsonl")
