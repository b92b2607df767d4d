"""The real model: SmolLM2-135M-Instruct from GGUF, with grouped-query attention, on real text."""

import json
import re

import numpy as np
import pytest
import torch
from support.pruned import load_pruned
from transformers import AutoModelForCausalLM

from flapcli.artifacts.plan import load_plan
from flapcli.checkpoints import open_checkpoint
from flapcli.evaluation.perplexity import exp_mean, window_losses
from flapcli.progress import Silent
from flapcli.texts.corpus import evaluation_windows


@pytest.fixture(scope="module")
def demo(flap, tmp_path_factory):
    """All stages as the paper has them, on fewer windows, and their JSON."""
    run = tmp_path_factory.mktemp("demo") / "run"
    result = flap("run", "demo", "-d", run, "--preset", "paper", "--nsamples", 64, "--json")
    return run, json.loads(result.stdout)


def test_gguf_tensors_equal_transformers_reading():
    source = open_checkpoint("demo")
    model = AutoModelForCausalLM.from_pretrained(source.path.parent, gguf_file=source.path.name, dtype=torch.float32)
    expected, config = model.state_dict(), model.config.to_dict()
    differ = {key for key in config | source.config if config.get(key) != source.config.get(key)}
    assert differ <= {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "quantization_config"}
    assert set(expected) - set(source.tensors) == {"lm_head.weight"}  # tied
    for name in source.tensors:
        assert torch.equal(source.read(name), expected[name]), name
    assert source.shape.parameters == sum(p.numel() for p in model.parameters())


def test_a_link_to_a_gguf_keeps_its_name(tmp_path):
    """The hub's cache links to blobs, whose names have no suffix."""
    (tmp_path / "blob").symlink_to(open_checkpoint("demo").path)
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blob")
    found = open_checkpoint(str(tmp_path / "model.gguf"))
    assert found.name == str(tmp_path / "model.gguf")
    assert open_checkpoint(found.name).fingerprint == found.fingerprint


def test_older_readers_find_the_ropes_base(demo):
    config = json.loads((demo[0] / "pruned" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert "rope_scaling" not in config


def test_transformers_4_knows_the_tokenizers_class(demo):
    settings = json.loads((demo[0] / "pruned" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_run_prunes_saves_and_measures(demo):
    run, data = demo
    assert {"stats", "plan", "checkpoint", "eval"} == set(data)
    assert data["plan"]["ratio"]["achieved"] == pytest.approx(0.2, abs=0.003)
    report = json.loads((run / "eval.json").read_text())
    assert report["baseline"]["perplexity"]["pydoc"] == pytest.approx(24.05, abs=0.01)  # METHOD.md
    assert 28 < report["perplexity"]["pydoc"] < 35
    assert report["size"]["parameters"] < 0.86 * report["baseline"]["size"]["parameters"]


def test_again_every_stage_answers_from_its_cache(demo, flap):
    run, _ = demo
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = flap("run", "demo", "-d", run, "--preset", "paper", "--nsamples", 64)
    assert result.stderr.count("up to date") == 4
    said = result.stdout
    assert re.search(
        r"\nparameters 134,515,008 -> 113,3\d\d,\d{3}: -15\.8% \(20\.0% of what can be pruned; 34,560 of", said
    )
    assert re.search(r"\nperplexity pydoc 24\.05 -> 3\d\.\d\d: \+[2-4]\d%\n", said)
    assert "weights, both as F32, 538.1 MB -> 453" in said and "the source is Q4_1, 5.7 bits a weight, 96.6 MB" in said
    assert said.endswith(f"  flap report -d {run}\n  flap export gguf -d {run}\n")
    assert re.search(r"all four stages: \d+ s", result.stderr)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_sliced_equals_masked_and_perplexity_is_plain(demo, flap):
    run, _ = demo
    flap("apply", "-d", run, "--mask-only", "--out", run / "masked")
    sliced, masked = (load_pruned(run / name) for name in ("pruned", "masked"))
    tokenizer = open_checkpoint("demo").load_tokenizer()
    ids = torch.from_numpy(evaluation_windows("pydoc", tokenizer, 128)[:2])
    with torch.no_grad():
        logits = sliced(ids).logits
        torch.testing.assert_close(logits, masked(ids).logits, rtol=1e-4, atol=1e-3)
        loss = torch.stack([sliced(row[None], labels=row[None]).loss for row in ids]).mean()
    assert exp_mean(window_losses(sliced, ids.numpy(), 1, Silent())) == pytest.approx(float(loss.exp()), rel=1e-4)
    text = "The for statement is used to"
    prompt = tokenizer(text, return_tensors="pt").input_ids
    assert len(sliced.generate(prompt, max_new_tokens=5, do_sample=False)[0]) == prompt.shape[1] + 5


def test_bfloat16_statistics_keep_the_plan(flap, tmp_path):
    """At least 97% of the removed units are the same."""
    gone = {}
    for dtype in ("float32", "bfloat16"):
        run = tmp_path / dtype
        flap("calibrate", "-d", run, "--nsamples", 16, "--dtype", dtype)
        flap("plan", "-d", run)
        plan = load_plan(run / "plan.yaml")
        gone[dtype] = {
            (i, module, int(unit))
            for i, layer in enumerate(plan.layers)
            for module in ("attention", "mlp")
            for unit in np.setdiff1d(np.arange(layer.module(module).of), plan.kept(i, module))
        }
    assert len(gone["float32"] & gone["bfloat16"]) / len(gone["float32"]) > 0.97
