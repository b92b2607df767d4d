"""SmolLM2 pruned in every form, served by vLLM: the same greedy tokens as transformers, offline and over HTTP."""

import json
from pathlib import Path

import pytest
import torch
from support.models import load_tokenizer
from support.pruned import greedy, load_served
from support.servers import post
from support.vllm import openai_server

pytestmark = pytest.mark.serving
COUNT = 32  # tokens
TEXTS = [
    "The capital of France is",
    "def add(a, b):\n",
    "Once upon a time there was a",
    "Lists and tuples differ in that",
]
# By case: options of plan, options of apply, whether layers have sizes of their own.
FORMS = {
    "uneven, biases": ("--ratio 0.2", "", True),
    "uneven, lstsq --no-bias": ("--ratio 0.3 --attention-unit query_head", "--compensate lstsq --no-bias", True),
    "even, biases": ("--ratio 0.2 --structure UL-UM", "", False),
    "even, lstsq --no-bias": ("--ratio 0.2 --structure UL-UM", "--compensate lstsq --no-bias", False),
    "depth": ("--method depth --ratio 0.2", "", False),
    "planned for two devices": ("--ratio 0.2 --tensor-parallel 2", "", True),
}


@pytest.fixture(scope="module")
def run(flap, tmp_path_factory):
    """One calibration for all."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    flap("calibrate", "demo", "-d", folder, "--dataset", "pydoc", "--nsamples", 16, "--gram")
    return folder


@pytest.fixture(scope="module")
def pruned(run, flap, tmp_path_factory):
    """The folder of a form, made once."""
    made: dict[str, Path] = {}

    def get(form: str) -> Path:
        if form not in made:
            made[form] = tmp_path_factory.mktemp("pruned") / "pruned"
            plan, apply, _ = FORMS[form]
            flap("plan", "-d", run, *plan.split())
            flap("apply", "-d", run, "--out", made[form], *apply.split())
        return made[form]

    return get


@pytest.fixture(scope="module")
def prompts(pruned):
    tokenizer = load_tokenizer(pruned("uneven, biases"))
    return [tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, pruned, prompts, same_tokens):
    folder = pruned(form)
    assert ("auto_map" in json.loads((folder / "config.json").read_text())) == FORMS[form][2]
    same_tokens(f"SmolLM2, {form}", folder, prompts, greedy(load_served(folder), prompts, COUNT))


def test_two_devices(pruned, prompts, same_tokens):
    """Which a plan of any sizes doesn't split over."""
    both = {"tensor_parallel_size": 2}
    folder = pruned("planned for two devices")
    expected = greedy(load_served(folder), prompts, COUNT)
    same_tokens("the same on two devices", folder, prompts, expected, **both)
    folder = pruned("uneven, biases")
    same_tokens("SmolLM2, uneven, biases, on two", folder, prompts, expected, refused="divisible", **both)


def test_merged_lora(pruned, prompts, same_tokens, tmp_path):
    from peft import LoraConfig, get_peft_model

    source = pruned("uneven, biases")
    torch.manual_seed(0)
    model = load_served(source)
    before = greedy(model, prompts, COUNT)
    lora = LoraConfig(r=4, lora_alpha=1, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, lora).merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(source).save_pretrained(tmp_path / "merged")
    after = greedy(load_served(tmp_path / "merged"), prompts, COUNT)
    assert after != before
    same_tokens("SmolLM2, uneven, biases, merged LoRA", tmp_path / "merged", prompts, after)


def test_completion_and_chat_by_openai_server(pruned, prompts, tmp_path):
    folder = pruned("uneven, biases")
    model, tokenizer = load_served(folder), load_tokenizer(folder)
    chat = [{"role": "user", "content": "What is a list?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    [plain], [told] = greedy(model, prompts[:1], COUNT), greedy(model, [asked], COUNT)
    how = {"model": "pruned", "temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
    with openai_server(folder, tmp_path / "log") as address:
        completion = post(f"{address}/v1/completions", how | {"prompt": TEXTS[0]})["choices"][0]["text"]
        answer = post(f"{address}/v1/chat/completions", how | {"messages": chat})["choices"][0]["message"]["content"]
    assert completion == tokenizer.decode(plain, skip_special_tokens=True)
    assert answer == tokenizer.decode(told, skip_special_tokens=True)
