"""Where every layer keeps the same sizes, the pruned folder is a stock checkpoint of its family."""

import json

import pytest
import torch
import yaml
from support.pruned import IDS, load_pruned, logits, masked_dense
from transformers import AutoModelForCausalLM

from flapcli.artifacts.model_card import model_card
from flapcli.artifacts.plan import load_plan

EVEN = "--structure UL-UM --ratio 0.34"
NO_BIAS_SWITCH = ("mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-biases", "llama-tied", "llama-head-dim"])
def test_stock_with_biases(kind, tiny, prune, flap, tmp_path):
    run = prune(tiny(kind), tmp_path / "run", EVEN)
    flap("apply", "-d", run, "--remote-code", "always", "--out", run / "remote")
    assert not (run / "pruned" / "modeling_flap.py").exists()
    assert (run / "remote" / "modeling_flap.py").exists()
    expected = logits(load_pruned(run / "remote"))
    torch.testing.assert_close(expected, logits(masked_dense(tiny(kind), run)), rtol=1e-4, atol=1e-4)
    loads_as_stock(run / "pruned", expected)


@pytest.mark.parametrize("kind", ["llama-mha", "mistral", "mistral-window", "qwen2", "qwen2-tied", "qwen3"])
def test_stock_without_compensation(kind, tiny, prune, tmp_path):
    run = prune(tiny(kind), tmp_path / "run", EVEN, "--compensate none")
    expected = logits(masked_dense(tiny(kind), run, bias=False))
    loads_as_stock(run / "pruned", expected)


@pytest.mark.parametrize("kind", NO_BIAS_SWITCH)
def test_families_that_know_no_such_bias_keep_remote_code(kind, tiny, prune, tmp_path):
    run = prune(tiny(kind), tmp_path / "run", EVEN)
    assert (run / "pruned" / "modeling_flap.py").exists()
    torch.testing.assert_close(
        logits(load_pruned(run / "pruned")), logits(masked_dense(tiny(kind), run)), rtol=1e-4, atol=1e-4
    )


def test_the_reason_is_said(tiny, prune, flap, tmp_path):
    run = prune(tiny("mistral"), tmp_path / "run", EVEN)
    said = flap("apply", "-d", run, "--force").stderr
    assert "MistralForCausalLM knows no bias on self_attn.o_proj and mlp.down_proj" in said
    said = flap("apply", "-d", run, "--compensate", "none").stderr
    assert "every layer keeps the same sizes: writing a stock MistralForCausalLM" in said
    flap("plan", "-d", run, "--ratio", 0.3)
    assert "layers keep different sizes" in flap("apply", "-d", run).stderr


def test_sizes_that_transformers_refuses_keep_remote_code(tiny, prune, tmp_path):
    """Five heads do not divide a hidden size of 48, which LlamaConfig's validator asks for."""
    run = prune(tiny("llama-mha"), tmp_path / "run", "--structure UL-UM --ratio 0.17")
    assert json.loads((run / "pruned" / "config.json").read_text())["flap"]["num_attention_heads"] == [5, 5, 5]
    assert (run / "pruned" / "modeling_flap.py").exists()
    assert torch.isfinite(logits(load_pruned(run / "pruned"), IDS)).all()


def test_a_second_round_of_a_stock_checkpoint(tiny, prune, tmp_path):
    first = prune(tiny("llama-gqa"), tmp_path / "one", EVEN)
    second = prune(first / "pruned", tmp_path / "two", "--ratio 0")
    loads_as_stock(second / "pruned", stock_logits(first / "pruned"))


def stock_logits(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def loads_as_stock(folder, expected):
    """By transformers' own class, without remote code: equal logits and no stray tensor."""
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    assert config["architectures"][0].removesuffix("ForCausalLM") in ("Llama", "Mistral", "Qwen2", "Qwen3")
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-4)


def test_eval_puts_perplexities_into_the_card(tiny, prune, flap, text_file, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    flap("eval", "-d", run, "--perplexity", text_file, "--seqlen", 16)
    report = json.loads((run / "eval.json").read_text())
    card = (run / "pruned" / "README.md").read_text()
    dense = report["baseline"]["perplexity"][str(text_file)]
    assert f"| topics.txt | {report['perplexity'][str(text_file)]:.2f} | {dense:.2f} |" in card
    (run / "pruned" / "README.md").write_text("my own card")
    flap("eval", "-d", run, "--perplexity", text_file, "--seqlen", 17)
    assert (run / "pruned" / "README.md").read_text() == "my own card"


def test_the_model_card_is_in_the_hubs_form(tiny, prune, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    text = (run / "pruned" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "transformers"
    config = json.loads((run / "pruned" / "config.json").read_text())
    config["flap"]["made_by"]["model"]["name"] = "meta-llama/Llama-3.2-1B"
    assert "# Llama-3.2-1B, pruned by flap" in model_card(config, load_plan(run / "plan.yaml"), None)
    assert metadata["pipeline_tag"] == "text-generation"
    assert "trust_remote_code=True" in text
    even = prune(tiny("llama-gqa"), tmp_path / "even", EVEN)
    assert "trust_remote_code=True" not in (even / "pruned" / "README.md").read_text()
