"""What the models say is what transformers alone makes them say."""

import json

import pytest
import torch
from support.models import load_dense, load_tokenizer

from flapcli.architecture import modeling_flap as modeling

PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def run(tiny, prune, tmp_path_factory):
    return prune(tiny("llama-gqa"), tmp_path_factory.mktemp("generate") / "run", "--ratio 0.4")


def test_greedy_equals_transformers(run, tiny, flap):
    said = json.loads(flap("generate", PROMPT, "-d", run, "--max-new-tokens", 7, "--json").stdout)
    tokenizer = load_tokenizer(tiny("llama-gqa"))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    pruned = modeling.FlapLlamaForCausalLM.from_pretrained(run / "pruned", dtype=torch.float32)
    for label, model in (("dense", load_dense(tiny("llama-gqa"))), ("pruned", pruned)):
        out = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)
        assert said[label] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert said["dense"] != said["pruned"]


def test_sampling_follows_the_seed(run, flap):
    def said(*more):
        result = flap("generate", PROMPT, "-d", run, "--sample", "--max-new-tokens", 12, "--json", *more)
        return json.loads(result.stdout)["pruned"]

    assert said("--seed", 1) == said("--seed", 1)
    assert said("--seed", 1) != said("--seed", 2)
    greedy = json.loads(flap("generate", PROMPT, "-d", run, "--max-new-tokens", 12, "--json").stdout)["pruned"]
    assert said("--temperature", 0.01) == greedy


def test_side_by_side_and_alone(run, flap):
    table = flap("generate", PROMPT, "-d", run, "--max-new-tokens", 3).stdout
    assert "dense" in table
    assert "pruned" in table
    alone = json.loads(flap("generate", PROMPT, "-d", run, "--max-new-tokens", 3, "--no-baseline", "--json").stdout)
    assert set(alone) == {"prompt", "model"}


def test_misuse_is_one_line(run, flap):
    assert "--chat" in flap("generate", PROMPT, "-d", run, "--chat", code=1).stderr
    assert "--sample" in flap("generate", PROMPT, "-d", run, "--temperature", 0.5, code=2).stderr
    assert "empty" in flap("generate", "", "-d", run, code=1).stderr


def test_the_chat_template_is_used(flap):
    arguments = ["--checkpoint", "demo", "--no-baseline", "--max-new-tokens", 12, "--json"]
    chat = json.loads(flap("generate", "What is the capital of France?", *arguments, "--chat").stdout)["model"]
    assert "Paris" in chat
