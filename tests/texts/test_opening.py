"""Windows begin with what the tokenizer puts before every text, and text that other windows hold never does."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from support.models import load_dense, load_tokenizer, tiny_tokenizer
from support.tokenizers_like import BOS, opening_with, sentencepiece_like

from flapcli.artifacts.stats import load_header
from flapcli.checkpoints import open_checkpoint
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.errors import UsageError
from flapcli.evaluation.perplexity import predicted_bytes
from flapcli.storage.safetensors_file import StreamWriter, read_header
from flapcli.texts import corpus
from flapcli.texts.corpus import calibration_windows, evaluation_windows
from flapcli.texts.opening import opening

TEXT = "the quick brown fox jumps over the lazy dog. Größe, café, 東京 and the fox. " * 12
SMALL = ("--nsamples", 4, "--seqlen", 16, "--dtype", "float32")


@pytest.mark.parametrize(
    ("template", "expected"),
    [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), ("<pad> <s> $A", [0, 1])],
)
def test_an_opening_is_what_the_tokenizer_does(template, expected):
    tokenizer = opening_with(template, tiny_tokenizer())
    assert opening(tokenizer) == expected
    tokenizer._add_bos_token = not expected  # a flag alone says nothing
    assert opening(tokenizer) == expected


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<pad> <s> $A"])
def test_windows_are_the_opening_and_then_text(template, tmp_path, monkeypatch):
    tokenizer, path = opening_with(template, tiny_tokenizer()), tmp_path / "a.txt"
    path.write_text(TEXT)
    first, plain = opening(tokenizer), tokenizer(TEXT, add_special_tokens=False).input_ids
    length = 12 - len(first)
    count, draw = len(plain) // length, random.Random(3)
    starts = [draw.randint(0, len(plain) - length - 1) for _ in range(7)]
    expected = [first + plain[start : start + length] for start in starts]
    assert calibration_windows(str(path), tokenizer, 7, 12, 3).tolist() == expected
    expected = [first + plain[i * length : (i + 1) * length] for i in range(count)]
    assert evaluation_windows(str(path), tokenizer, 12).tolist() == expected
    monkeypatch.setattr(corpus, "_hub_rows", lambda *_: [TEXT])
    drawn = calibration_windows("c4", tokenizer, 7, 12, 3)
    assert drawn[:, : len(first)].tolist() == [first] * 7
    assert not set(first) & set(drawn[:, len(first) :].flatten())
    with pytest.raises(UsageError, match="windows begin with 2 special tokens"):
        evaluation_windows(str(path), opening_with("<pad> <s> $A", tokenizer), 2)


def test_a_templates_own_bos_is_no_second_one(tmp_path):
    tokenizer, path = opening_with("<s> $A", tiny_tokenizer()), tmp_path / "chats.jsonl"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    path.write_text(json.dumps({"text": [{"role": "user", "content": TEXT}]}))
    windows = evaluation_windows(str(path), tokenizer, 12)
    assert (windows == BOS).sum() == len(windows)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_bytes_are_those_of_all_the_text(kind, text_file, tmp_path):
    """Also where a decoder drops the space that a text begins with."""
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 40)
    spaced = kind == "sentencepiece"
    tokenizer = sentencepiece_like(text_file.read_text()) if spaced else opening_with("<s> $A", tiny_tokenizer())
    tokenizer.add_bos_token = True
    assert opening(tokenizer) == [tokenizer.bos_token_id]
    windows = evaluation_windows(str(path), tokenizer, 10)
    whole = tokenizer.decode(windows[:, 1:].flatten().tolist())
    assert predicted_bytes(windows, tokenizer) == len(whole.encode()) + spaced  # the one before the very first word


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A tiny model whose tokenizer puts BOS before every text."""
    folder = shutil.copytree(tiny("llama-gqa"), tmp_path_factory.mktemp("bos") / "model")
    opening_with("<s> $A", load_tokenizer(folder)).save_pretrained(folder)
    assert opening(load_tokenizer(folder)) == [BOS]
    return folder


@pytest.fixture(scope="module")
def run(model, flap, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flap("calibrate", model, "-d", folder, "--dataset", text_file, "--dataset", "self", "--gram", *SMALL)
    flap("plan", "-d", folder, "--ratio", 0.3)
    flap("apply", "-d", folder, "--compensate", "lstsq", "--sequential")  # which draws the same windows again
    flap("eval", "-d", folder, "--perplexity", text_file, "--seqlen", 16, "--dtype", "float32")
    return folder


def test_artifacts_say_it(run, tiny, prune, flap, text_file, tmp_path):
    assert load_header(run / "stats.safetensors").calibration.begins_with == "<s>"
    assert "begins with <s>" in flap("show", run / "stats.safetensors").stdout
    assert json.loads(flap("show", run, "--json").stdout)["stats"]["calibration"]["begins_with"] == "<s>"
    report = json.loads((run / "eval.json").read_text())
    for model in (report, report["baseline"]):
        assert model["perplexity_details"][str(text_file)]["begins_with"] == "<s>"
    plain = prune(tiny("llama-gqa"), tmp_path / "plain")
    flap("eval", "-d", plain, "--perplexity", text_file, "--seqlen", 16, "--no-baseline")
    assert "begins_with" not in read_header(plain / "stats.safetensors").metadata["flap"]
    assert "begins_with" not in flap("show", plain, "--json").stdout + (plain / "eval.json").read_text()


@pytest.mark.parametrize("template", ["<s> $A", "<pad> <s> $A"])
def test_perplexity_is_that_of_the_text_after_it(template, model, flap, text_file, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    opening_with(template, load_tokenizer(folder)).save_pretrained(folder)
    first, text = opening(load_tokenizer(folder)), load_tokenizer(folder)(text_file.read_text()).input_ids
    length = 16 - len(first)
    parts = np.array(text[len(first) :][: 20 * length]).reshape(20, length).tolist()
    ids = torch.tensor([first + part for part in parts])
    labels = ids.masked_fill(torch.arange(16) < len(first), -100)
    (tmp_path / "a.txt").write_text(load_tokenizer(folder).decode([token for part in parts for token in part]))
    with torch.no_grad():
        expected = math.exp(load_dense(folder)(ids, labels=labels).loss)
    for way in ("--stream", "--no-stream"):
        more = ("--perplexity", tmp_path / "a.txt", "--seqlen", 16, "--dtype", "float32", way, "--json")
        found = json.loads(flap("eval", folder, "--out", tmp_path / f"{way}.json", *more).stdout)
        assert found["perplexity"][str(tmp_path / "a.txt")] == pytest.approx(expected, rel=1e-4)
        assert found["perplexity_details"][str(tmp_path / "a.txt")]["tokens"] == 20 * length


def as_an_older_flap_left_it(run, to):
    """A copy of a run of which no artifact says what its windows begin with."""
    shutil.copytree(run, to)
    stats, header = to / "stats.safetensors", read_header(run / "stats.safetensors")
    said = json.loads(header.metadata["flap"])
    del said["calibration"]["begins_with"]
    data = (run / "stats.safetensors").read_bytes()[-sum(spec.nbytes for spec in header.tensors.values()) :]
    with StreamWriter(stats, header.tensors.values(), {"flap": json.dumps(said)}) as writer:
        for name, spec in header.tensors.items():
            writer.write(name, memoryview(data[: spec.nbytes]))
            data = data[spec.nbytes :]
    report = json.loads((to / "eval.json").read_text())
    for measured in (report, report["baseline"]):
        for details in measured["perplexity_details"].values():
            del details["begins_with"]
    (to / "eval.json").write_text(json.dumps(report))
    return to


def test_what_an_older_flap_left_is_made_anew(run, model, flap, text_file, tmp_path):
    calibrate = ("calibrate", model, "--dataset", text_file, "--dataset", "self", "--gram", *SMALL)
    measure = ("eval", "--perplexity", text_file, "--seqlen", 16, "--dtype", "float32")
    for command in (calibrate, measure):
        assert "up to date" in flap(*command, "-d", run).stderr
    old = as_an_older_flap_left_it(run, tmp_path / "old")
    assert "written" in flap(*measure, "-d", old).stderr
    flap("plan", "-d", old, "--ratio", 0.3)
    said = flap("apply", "-d", old, "--compensate", "lstsq", "--sequential", "--force", code=1).stderr
    assert "stats.safetensors begin with text" in said
    assert "with <s>: run `flap calibrate --force`" in said
    assert "stats.safetensors: written" in flap(*calibrate, "-d", old).stderr


def test_a_cache_that_the_files_alone_answer_loads_no_tokenizer(tiny, prune, flap, text_file, tmp_path, monkeypatch):
    plain = prune(tiny("llama-gqa"), tmp_path / "plain")
    measure = ("eval", "-d", plain, "--perplexity", text_file, "--seqlen", 16)
    flap(*measure)
    monkeypatch.setattr(Checkpoint, "load_tokenizer", lambda _: pytest.fail("loaded"))
    prune(tiny("llama-gqa"), plain)
    assert "up to date" in flap(*measure).stderr


@pytest.mark.parametrize(
    ("template", "said", "may"),
    [
        ("$A", {}, False),
        ("<s> $A", {}, True),
        ("$A", {"add_bos_token": True}, True),
        ("$A", {"tokenizer_class": "LlamaTokenizer"}, True),
        ("$A", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}, True),
    ],
)
def test_what_files_alone_rule_out(template, said, may, tiny, tmp_path):
    folder = shutil.copytree(tiny("llama-gqa"), tmp_path / "model")
    opening_with(template, load_tokenizer(folder)).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | said))
    assert open_checkpoint(str(folder)).may_open_texts is may
    (folder / "tokenizer.json").unlink()
    assert open_checkpoint(str(folder)).may_open_texts
