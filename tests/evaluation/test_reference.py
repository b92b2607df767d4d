"""Divergence from the dense model beside perplexity: what torch says of the logits of both, whole and at once."""

import json

import pytest
import torch
from support import models
from support.models import load_dense, load_tokenizer
from support.pruned import load_pruned
from torch.nn.functional import kl_div
from transformers import LlamaConfig

from flapcli.artifacts.eval_report import load_report
from flapcli.texts.corpus import evaluation_windows

SMALL = ["--seqlen", 80, "--perplexity-windows", 5]  # more tokens than logits are compared of at a time


@pytest.fixture(scope="module")
def run(tiny, prune, tmp_path_factory):
    return prune(tiny("llama-tied"), tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def expected(tiny, run, text_file):
    """Of each window's tokens: divergences, and whether the likeliest token is the same."""
    whole = evaluation_windows(str(text_file), load_tokenizer(tiny("llama-tied")), 80)
    last = len(whole) - 1
    ids = torch.from_numpy(whole[[round(last * share / 4) for share in range(5)]])
    with torch.no_grad():
        both = load_dense(tiny("llama-tied")), load_pruned(run / "pruned")
        dense, ours = (model(ids).logits[:, :-1].double() for model in both)
    apart = kl_div(ours.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return apart, (dense.argmax(-1) == ours.argmax(-1)).double()


@pytest.mark.parametrize("way", ["--no-stream", "--stream in files"])
def test_it_is_what_torch_says_of_whole_logits(way, run, expected, flap, text_file, tmp_path, monkeypatch):
    if way.endswith("files"):
        monkeypatch.setattr("flapcli.execution.memory.free_memory", lambda _device: 0)
    command = ["eval", "-d", run, "--perplexity", text_file, *SMALL, way.split()[0], "--batch-size", 2, "--divergence"]
    flap(*command, "-o", tmp_path / "eval.json")
    report, (apart, equal) = load_report(tmp_path / "eval.json"), expected
    found = report.perplexity_details[str(text_file)].divergence
    assert found.kl == pytest.approx(float(apart.mean()), rel=1e-5)
    assert found.standard_error == pytest.approx(float(apart.mean(1).std() / 5**0.5), rel=1e-4)
    assert 0 < found.equal_tokens < 1
    assert found.equal_tokens == pytest.approx(float(equal.mean()))
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]
    assert "divergence" not in report.baseline.model_dump_json()


def test_the_dense_model_is_not_apart_from_itself(tiny, flap, text_file, tmp_path):
    """Its head, read anew, makes the very logits of what its layers put out."""
    model, more = tiny("llama-tied"), ["--dtype", "bfloat16", "--batch-size", 3]
    found = flap("eval", model, "--model", model, "--perplexity", text_file, *SMALL, *more, "--divergence",
                 "-o", tmp_path / "eval.json", "--json")  # fmt: skip
    [details] = json.loads(found.stdout)["perplexity_details"].values()
    assert details["divergence"] == {"kl": 0.0, "standard_error": 0.0, "equal_tokens": 1.0}


def test_it_is_measured_where_it_is_asked_for(run, flap, text_file, tmp_path):
    command = ["eval", "-d", run, "--perplexity", text_file, *SMALL, "-o", tmp_path / "eval.json"]
    flap(*command)
    assert "divergence" not in (tmp_path / "eval.json").read_text()  # as before there was one
    flap(*command, "--divergence")
    assert "up to date" in flap(*command, "--divergence").stderr
    shown = flap("show", tmp_path / "eval.json").stdout, flap("compare", *[tmp_path / "eval.json"] * 2).stdout
    assert all("equal next tokens" in " ".join(text.split()) for text in shown)


@pytest.mark.parametrize(
    ("asked", "words", "code"),
    [
        ("", "does not say of which model it was made: name the dense one by --model", 1),
        ("--no-baseline", "--no-baseline leaves out", 2),
        ("--model {wider}", "predicts 320 tokens and {wider} 330", 1),
        ("--model {other}", "make other tokens of {text}", 1),
    ],
)
def test_what_it_is_refused_for(asked, words, code, tiny, flap, text_file, tmp_path, monkeypatch):
    places = {"wider": tmp_path / "wider", "other": tmp_path / "other", "text": text_file}
    monkeypatch.setitem(models.CONFIGS, "wider", LlamaConfig(**models.SIZES | {"vocab_size": 330}, **models.GQA))
    models.make_tiny(places["wider"], "wider")
    models.make_tiny(places["other"], "llama-gqa")
    tokenizer = json.loads((places["other"] / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (places["other"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["eval", tiny("llama-gqa"), "--perplexity", text_file, *SMALL, "-o", tmp_path / "eval.json"]
    result = flap(*command, *asked.format(**places).split(), "--divergence", code=code)
    assert words.format(**places) in result.stderr.splitlines()[-1]
