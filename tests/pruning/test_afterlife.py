"""What people do with a pruned folder by the code that lies in it: batches, training, compiling, quantising.

Each test runs on uneven layers, and on a model with a layer without heads and one without neurons.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.edits import edit_keep
from support.models import CONFIGS, SIZES, make_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    TorchAoConfig,
)

IDS = torch.tensor([[5, 17, 200, 31, 7, 99], [1, 2, 3, 4, 5, 6]])
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 8}
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=["uneven", "emptied"])
def folder(request, tiny, prune, flap, tmp_path_factory) -> Path:
    run = prune(tiny("llama-gqa"), tmp_path_factory.mktemp("run") / request.param, "--ratio 0.3")
    if request.param == "emptied":
        edit_keep(run, (0, "attention"), (1, "mlp"))
        flap("apply", "-d", run)
    return run / "pruned"


def load(folder: Path, **options):
    options = {"dtype": torch.float32, "trust_remote_code": True} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_save_in_shards_and_reload(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_a_left_padded_batch_generates_what_each_alone_does(folder, cache):
    model = load(folder)
    prompts = [[5, 17, 200, 31, 7, 99, 250], [9, 8, 40], [77, 12, 13, 14]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    batch = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **options)
    for prompt, row in zip(prompts, batch, strict=True):
        alone = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :]
        assert torch.equal(row[longest:], alone)


def test_continuous_batching_generates_what_each_prompt_alone_does(folder):
    """Its cache has the configuration's heads in every layer, and is no transformers.Cache."""
    prompts = [[5, 17, 200, 31, 7, 99, 250], [9, 8, 40]]
    model = load(folder, attn_implementation="sdpa")
    how = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=-1, pad_token_id=0)
    answers = model.generate_batch(prompts, generation_config=how, progress_bar=False)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        assert answer.error is None
        alone = model.generate(torch.tensor([prompt]), **GREEDY | {"max_new_tokens": 4})[0, len(prompt) :]
        assert answer.generated_tokens == alone.tolist()


def test_to_bfloat16(folder):
    model = load(folder)
    expected = logits(model)
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (logits(model).float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert model.generate(IDS, **GREEDY).shape == (2, 14)


@pytest.mark.parametrize("folder", ["emptied"], indirect=True)
def test_compile_a_forward_without_graph_breaks(folder):
    model = load(folder)
    expected = logits(model)
    backend = "inductor" if "uneven" in str(folder) else "aot_eager"  # inductor takes ten seconds a model
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)(IDS, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_lora_training_saving_and_merging(folder, tmp_path):
    """The usual way to recover quality: adapters on every linear layer lower the loss; they save, reload and merge."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    trained = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), trained, **EXACT)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), trained, rtol=1e-4, atol=1e-4)


def test_full_training_step_with_checkpointed_activations(folder):
    model = load(folder).train()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == set()


def test_device_map_auto_and_offloading_to_disk(folder, tmp_path):
    expected = logits(load(folder))
    torch.testing.assert_close(logits(load(folder, device_map="auto")), expected, **EXACT)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{i}": "disk" if i < 2 else "cpu" for i in range(3)}
    offloaded = load(folder, device_map=places, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    torch.testing.assert_close(logits(offloaded), expected, **EXACT)


@pytest.mark.parametrize("folder", ["emptied"], indirect=True)
def test_torchao_int8(folder):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    expected = logits(load(folder))
    quantised = load(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert type(quantised.model.layers[2].mlp.down_proj.weight).__name__ == "Int8Tensor"
    assert (logits(quantised) - expected).abs().max() < 0.1 * expected.abs().max()
    dynamic = load(folder)
    quantize_(dynamic, Int8DynamicActivationInt8WeightConfig())
    assert (logits(dynamic) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("folder", ["emptied"], indirect=True)
def test_bitsandbytes_int8(folder):
    expected = logits(load(folder))
    quantised = load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")
    assert type(quantised.model.layers[2].mlp.down_proj).__name__ == "Linear8bitLt"
    assert (logits(quantised) - expected).abs().max() < 0.1 * expected.abs().max()


def in_4bit(folder: Path):
    """The folder in 4 bits, and a plain model of the same values."""
    from bitsandbytes.functional import dequantize_4bit

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised, plain = load(folder, quantization_config=settings, device_map="cpu"), load(folder)
    for name, module in quantised.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.reshape(module.out_features, module.in_features)
    return quantised, plain


@pytest.mark.parametrize("folder", ["emptied"], indirect=True)
def test_bitsandbytes_4bit(folder):
    """Training mode, as QLoRA has it: any sizes."""
    quantised, plain = in_4bit(folder)
    assert type(quantised.model.layers[2].mlp.down_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(logits(quantised.train()), logits(plain), **EXACT)


def test_bitsandbytes_4bit_inference_with_widths_in_multiples_of_64(tiny, prune, tmp_path, monkeypatch):
    """On a CPU with AVX512-BF16 its inference packs weights by 32 rows and 64 columns: `--round-to 64` keeps them."""
    config = LlamaConfig(
        **SIZES | {"hidden_size": 64, "intermediate_size": 256},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    )
    monkeypatch.setitem(CONFIGS, "llama-64", config)
    run = prune(make_tiny(tmp_path / "m", "llama-64"), tmp_path / "run", "--ratio 0.3 --round-to 64")
    quantised, plain = in_4bit(run / "pruned")
    assert len(set(plain.config.flap["intermediate_size"])) > 1
    assert (logits(quantised) - logits(plain)).abs().max() < 0.1 * logits(plain).abs().max()


@pytest.mark.parametrize("folder", ["uneven"], indirect=True)
def test_lm_eval_from_outside(folder, tmp_path):
    """`lm_eval --model hf` on a task of one's own; its accuracy is what the log-likelihoods say."""
    documents = [
        {"question": f"the {first} {second}", "choices": ["fox", "dog", "lazy"], "label": i % 3}
        for i, (first, second) in enumerate(
            (first, second) for first in ("quick", "brown", "lazy", "over") for second in ("jumps", "fox", "the")
        )
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "own", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    arguments += ["--tasks", "own", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "4"]
    command = [sys.executable, "-m", "lm_eval", *map(str, arguments), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [result] = (tmp_path / "out").rglob("results*.json")
    found = json.loads(result.read_text())["results"]["own"]["acc,none"]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    right = [int(_likeliest(model, tokenizer, d["question"], d["choices"]) == d["label"]) for d in documents]
    assert found == pytest.approx(sum(right) / len(right))
    assert 0 < found < 1


def _likeliest(model, tokenizer, text, choices):
    scores = []
    for choice in choices:
        start, ids = len(tokenizer(text).input_ids), tokenizer(f"{text} {choice}", return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        scores.append(float(logprobs.gather(1, ids[0, start:, None]).sum()))
    return scores.index(max(scores))
