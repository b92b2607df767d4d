"""Broken and hostile files of a checkpoint, and options that are none: one line, exit 1 or 2."""

import json
import struct

import pytest
from support.models import make_tiny


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
