"""Perplexity of several texts, its standard error, and bits per byte."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from support.measured import CPU
from support.models import FEW, load_dense, load_tokenizer

from flapcli.checkpoints import open_checkpoint
from flapcli.evaluation.perplexity import predicted_bytes, window_losses
from flapcli.execution.device import Runtime
from flapcli.execution.hidden_states import HiddenStates
from flapcli.execution.layerwise import LayerwiseModel
from flapcli.execution.loading import load_model
from flapcli.progress import Silent
from flapcli.texts.corpus import evaluation_windows


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (folder / "other.txt").write_text("Größe, café, 东京 and the lazy dog. " * 60)
    return [str(folder / name) for name in ("plain.txt", "other.txt")]


@pytest.mark.parametrize("most", [3, "all"])
def test_every_figure_follows_from_the_windows_losses(most, tiny, flap, texts, tmp_path):
    out = tmp_path / "eval.json"
    options = [part for text in texts for part in ("--perplexity", text)]
    flap("eval", tiny("llama-gqa"), "--no-baseline", "--seqlen", 16, "--out", out, *options, "--batch-size", 3,
         "--perplexity-windows", most)  # fmt: skip
    report = json.loads(out.read_text())
    model, tokenizer = load_dense(tiny("llama-gqa")), load_tokenizer(tiny("llama-gqa"))
    for text in texts:
        windows = whole = evaluation_windows(text, tokenizer, 16)
        if most == 3:
            windows = whole[[0, round((len(whole) - 1) / 2), -1]]
        ids = torch.from_numpy(windows)
        with torch.no_grad():
            losses = np.array([float(model(row[None], labels=row[None]).loss) for row in ids])
        details = report["perplexity_details"][text]
        assert report["perplexity"][text] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
        error = math.exp(losses.mean()) * losses.std(ddof=1) / math.sqrt(len(losses))
        assert details["standard_error"] == pytest.approx(error, rel=1e-3)
        assert (details["windows"], details.get("of_windows", len(windows))) == (len(windows), len(whole))
        assert (details["tokens"], details["dtype"]) == (len(windows) * 15, "float32")
        assert details["bits_per_byte"] == pytest.approx(losses.sum() * 15 / math.log(2) / details["bytes"], rel=1e-4)


def test_bytes_are_those_of_the_predicted_text(tiny, texts):
    tokenizer = load_tokenizer(tiny("llama-gqa"))
    windows = evaluation_windows(texts[0], tokenizer, 16)
    size = sum(len(tokenizer.decode([token]).encode()) for row in windows for token in row[1:])
    assert predicted_bytes(windows, tokenizer) == size


def test_batches_change_nothing(tiny, texts):
    model = load_dense(tiny("qwen2"))
    windows = evaluation_windows(texts[0], load_tokenizer(tiny("qwen2")), 12)[:7]
    alone, together = (window_losses(model, windows, batch, Silent()) for batch in (1, 4))
    np.testing.assert_allclose(alone, together, rtol=1e-5)


def test_streamed_equals_in_memory(any_tiny, prune, flap, text_file, tmp_path):
    """One layer at a time gives the losses of the whole model, for dense and pruned checkpoints of every family."""
    run = prune(any_tiny, tmp_path / "run")
    found = {}
    for way in ("--stream", "--no-stream"):
        flap("eval", "-d", run, "--perplexity", text_file, "--seqlen", 24, way, "--force")
        report = json.loads((run / "eval.json").read_text())
        found[way] = [report["perplexity"][str(text_file)], report["baseline"]["perplexity"][str(text_file)]]
    assert found["--stream"] == pytest.approx(found["--no-stream"], rel=1e-6)


def test_hidden_states_in_files_change_nothing(tiny, flap, text_file, tmp_path, monkeypatch):
    args = (
        "eval",
        tiny("llama-gqa"),
        "--perplexity",
        text_file,
        "--seqlen",
        24,
        "--batch-size",
        3,
        "--stream",
        "--json",
    )
    in_memory = json.loads(flap(*args, "-d", tmp_path / "memory").stdout)
    written = []
    turn = HiddenStates.turn
    monkeypatch.setattr(HiddenStates, "turn", lambda self, layer: (turn(self, layer), written.append(self._source)))
    monkeypatch.setattr("flapcli.execution.memory.free_memory", lambda _device: 0)
    in_files = json.loads(flap(*args, "-d", tmp_path / "files").stdout)
    assert in_files["perplexity"] == in_memory["perplexity"]
    assert [path.name for path in written] == [f"hidden-{turn}.bin" for turn in (1, 2, 3, 4)]
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["eval.json"]


@pytest.mark.parametrize("kind", FEW)
def test_logits_are_the_models_own(kind, tiny, texts, monkeypatch):
    """To the bit, also where a family does more after the head than today's: here a scale and a cap."""
    checkpoint, runtime = open_checkpoint(tiny(kind)), Runtime(CPU, torch.float32, 4)
    forward = (family := getattr(transformers, checkpoint.family.architecture)).forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 3 * torch.tanh(output.logits / 7)
        return output

    monkeypatch.setattr(family, "forward", capped)
    windows = evaluation_windows(texts[0], checkpoint.load_tokenizer(), 12)[:4]
    layerwise, states, found = LayerwiseModel(checkpoint, windows, runtime, Silent()), [], []
    with torch.inference_mode():
        layerwise.embed(lambda _, embedded: states.append(embedded))
        for layer in layerwise.layers(range(checkpoint.shape.num_layers)):
            layerwise.run(layer, lambda _, through: states.append(through(states[-1])))
        layerwise.head(lambda _, logits: found.append(logits(states[-1])))
        whole = load_model(checkpoint, torch.float32, CPU)(torch.from_numpy(windows)).logits
    assert torch.equal(found[0], whole)


def test_stream_refuses_what_needs_the_whole_model(tiny, prune, flap, text_file, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    result = flap("eval", "-d", run, "--perplexity", text_file, "--stream", "--speed", code=2)
    assert "--stream: tasks and speed need the whole model in memory" in result.stderr
