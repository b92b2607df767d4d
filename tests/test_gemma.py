"""Gemma-3-270m, a real model of another family: BOS before every window, norms behind the modules, one KV head."""

import json
import math
from pydoc_data.topics import topics

import pytest
import torch
from support.gemma import gemma_folder
from support.models import load_dense, load_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.gemma
WINDOWS = 6  # of 128 tokens


@pytest.fixture(scope="module")
def model():
    try:
        return gemma_folder()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def text(model, tmp_path_factory):
    """Of pydoc, what no calibration reads, in a file."""
    tokenizer, path = load_tokenizer(model), tmp_path_factory.mktemp("text") / "pydoc.txt"
    whole = "\n\n".join(topics.values())
    ids = tokenizer(whole[int(0.7 * len(whole)) :][:20000], add_special_tokens=False).input_ids
    path.write_text(tokenizer.decode(ids[: WINDOWS * 127 + 1]))
    return path


@pytest.fixture(scope="module")
def run(model, text, flap, tmp_path_factory):
    """Pruned by a fifth, with least squares, on little text."""
    folder = tmp_path_factory.mktemp("gemma") / "run"
    flap("calibrate", model, "-d", folder, "--dataset", "pydoc", "--nsamples", 16, "--gram")
    flap("plan", "-d", folder, "--ratio", 0.2)
    flap("apply", "-d", folder, "--compensate", "lstsq")
    flap("eval", "-d", folder, "--perplexity", text, "--dtype", "float32")
    return folder


def perplexity(model, windows):
    with torch.inference_mode():
        losses = [cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]) for ids in windows]
    return math.exp(torch.stack(losses).mean())


def test_figures_are_transformers_own_with_bos_and_not_without(run, model, text):
    report, dense, tokenizer = json.loads((run / "eval.json").read_text()), load_dense(model), load_tokenizer(model)
    found, name = report["baseline"]["perplexity"], str(text)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False).input_ids[: WINDOWS * 127])
    first = torch.full((WINDOWS, 1), tokenizer.bos_token_id)
    assert found[name] == pytest.approx(perplexity(dense, torch.cat([first, ids.view(WINDOWS, 127)], 1)), rel=1e-3)
    assert 10 < found[name] < 40 < 3 * found[name] < perplexity(dense, ids.view(WINDOWS, 127))
    assert found[name] < report["perplexity"][name] < 4 * found[name]
    assert report["perplexity_details"][name]["begins_with"] == "<bos>"
    assert report["size"]["parameters"] < report["baseline"]["size"]["parameters"]


def test_streamed_perplexity_is_the_same(run, flap, text):
    more = ("--perplexity", text, "--dtype", "float32", "--no-baseline", "--stream", "--json")
    streamed = json.loads(flap("eval", run / "pruned", *more, "--out", run / "streamed.json").stdout)
    whole = json.loads((run / "eval.json").read_text())
    assert streamed["perplexity"][str(text)] == pytest.approx(whole["perplexity"][str(text)], rel=1e-4)


def test_the_folder_loads_and_generates(run, flap):
    tokenizer = load_tokenizer(run / "pruned")
    model = AutoModelForCausalLM.from_pretrained(run / "pruned", trust_remote_code=True, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.inference_mode():
        whole = model(ids).logits[:, -1]
        step = model.generate(ids, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True)
    torch.testing.assert_close(step.scores[0], whole, rtol=1e-3, atol=1e-3)
    assert flap("generate", "The capital of France is", "-d", run, "--max-new-tokens", 8, "--no-baseline").stdout
