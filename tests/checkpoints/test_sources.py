"""Checkpoints that only their publishers' code reads, read as the family that computes the same, without that code."""

import json

import pytest
import torch
from support.edits import even_plan
from support.foreign import FOREIGN, foreign_logits, make_foreign
from support.models import load_dense, to_bin
from support.pruned import CLOSE, IDS, load_pruned, logits

from flapcli.architecture.source import sources
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint

SMALL = ["--nsamples", "8", "--seqlen", "16", "--dtype", "float32"]


@pytest.fixture(scope="module", params=FOREIGN)
def foreign(request, tmp_path_factory):
    """The publisher's folder; its native twin lies beside it."""
    return make_foreign(tmp_path_factory.mktemp(request.param), request.param)


def test_every_description_has_a_model():
    assert {kind for kind, *_ in FOREIGN.values()} == set(sources())


def test_the_family_computes_what_the_publishers_code_does(foreign):
    """The one oracle is written by hand, the other the model that the files were made from."""
    native = load_dense(foreign.parent / "native")
    torch.testing.assert_close(foreign_logits(foreign, IDS), logits(native), rtol=1e-5, atol=2e-5)
    read, expected = open_checkpoint(str(foreign)), open_checkpoint(str(foreign.parent / "native"))
    assert read.tensors == expected.tensors
    for name in expected.tensors:
        torch.testing.assert_close(read.read(name), expected.read(name), rtol=1e-6, atol=1e-7)


def test_it_is_pruned_as_the_native_model(foreign, flap, text_file):
    """Every stage, in memory and streamed; what is written is the native family's, and opens without theirs."""
    runs = {}
    for name in ("native", "foreign"):
        run = runs[name] = foreign.parent / f"run-{name}"
        how = ["--stream"] if name == "foreign" else []
        flap("calibrate", foreign.parent / name, "-d", run, "--dataset", text_file, *SMALL, *how)
        flap("plan", "-d", run, "--ratio", "0.3")
        flap("apply", "-d", run)
    torch.testing.assert_close(
        logits(load_pruned(runs["foreign"] / "pruned")), logits(load_pruned(runs["native"] / "pruned")), **CLOSE
    )
    config = json.loads((runs["foreign"] / "pruned" / "config.json").read_text())
    assert config["model_type"] == load_stats(runs["foreign"] / "stats.safetensors").header.model.family != "foreign"
    assert "Foreign" not in json.dumps(config)
    small = [
        "--perplexity",
        text_file,
        "--seqlen",
        "32",
        "--dtype",
        "float32",
        "--json",
        "-o",
        foreign.parent / "e.json",
    ]
    found = json.loads(flap("eval", runs["foreign"] / "pruned", *small, "--no-stream").stdout)
    assert found["baseline"]["perplexity"][str(text_file)] > 1


def test_even_is_a_stock_folder_of_the_family(foreign, flap, tmp_path):
    """Of the native class, with nothing of the publisher's: transformers finds each tensor, and no other."""
    even_plan(foreign.parent / "run-foreign", tmp_path, flap)
    flap("apply", "-d", tmp_path, "--compensate", "none")
    assert "auto_map" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert not (tmp_path / "pruned" / "modeling_foreign.py").exists()
    loader = type(load_pruned(tmp_path / "pruned"))
    _, told = loader.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_in_bin_files_too(tmp_path):
    folder = make_foreign(tmp_path, "baichuan")
    expected = {name: open_checkpoint(str(folder)).read(name) for name in open_checkpoint(str(folder)).tensors}
    read = open_checkpoint(str(to_bin(folder, 2)))
    assert set(read.tensors) == set(expected)
    assert all(torch.equal(read.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("baichuan", {"max_position_embeddings": None}, "ALiBi beside RMS norms"),
        ("baichuan", {"hidden_size": None}, "lacks hidden_size"),
        ("chatglm", {"multi_query_attention": False}, "only True makes a chatglm model compute what glm does"),
        ("chatglm", {"rope_ratio": "x"}, "rope_ratio is 'x', where a number is wanted"),
        ("chatglm", {"position_encoding_2d": True}, "ChatGLM-6B, the first, is another architecture"),
        ("qwen", {"no_bias": False}, "only True makes a qwen model compute what qwen2 does"),
        ("internlm2", {"num_key_value_heads": 2}, "has 96 rows, expected 80 by the sizes in config.json"),
    ],
)
def test_what_the_family_does_not_compute_is_refused(name, changes, words, tmp_path, flap, text_file):
    folder = make_foreign(tmp_path, name)
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(config))
    said = " ".join(
        flap("calibrate", folder, "-d", tmp_path / "run", "--dataset", text_file, *SMALL, code=1).stderr.split()
    )
    assert words in said


def test_a_tokenizer_of_code_in_the_folder_is_refused_unless_trusted(tmp_path, flap, text_file):
    folder = make_foreign(tmp_path, "internlm2")
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    told = {"tokenizer_class": "ForeignTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_foreign.T", None]}}
    path.write_text(json.dumps(told))
    asked = ("calibrate", folder, "-d", tmp_path / "run", "--dataset", text_file, *SMALL)
    said = " ".join(flap(*asked, code=1).stderr.split())
    assert "only code in the folder can read it (auto_map in tokenizer_config.json)" in said
    assert "--trust-remote-code" in said
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass T(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "tokenization_foreign.py").write_text(code)
    (folder / "tokenizer.json").write_bytes((tmp_path / "native" / "tokenizer.json").read_bytes())
    flap(*asked, "--trust-remote-code")
