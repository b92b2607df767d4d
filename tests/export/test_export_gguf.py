"""Exported GGUF files in a stock llama.cpp: the same logits, the same tokens, the same perplexity as in torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from support.edits import edit_keep
from support.families import make_family
from support.gguf_files import write_gguf
from support.models import CONFIGS, GQA, SIZES, make_tiny
from support.pruned import load_pruned
from support.tokenizers_like import PRE, VOCABULARY, byte_level, gemma_like, sentencepiece_like
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig

from flapcli.architecture import modeling_flap as modeling
from flapcli.architecture.rope import llama3_factors, llama3_parameters
from flapcli.architecture.shape import LayerShape
from flapcli.checkpoints import open_checkpoint
from flapcli.export.kquants import advice
from flapcli.texts.corpus import evaluation_windows

llamacpp = pytest.importorskip("support.llamacpp", reason="the extra gguf-test brings llama.cpp", exc_type=ImportError)

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPES = {"rope-llama3": LLAMA3, "rope-linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}
EXPORTED = ["llama-biases", "llama-head-dim", "mistral", "qwen2", "qwen2-tied"]  # and in test_gguf_forms.py
IDS = torch.randint(3, 320, (120,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module", autouse=True)
def more_configs():
    """Scaled rotary embeddings, for this module."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, rope in ROPES.items():
            patch.setitem(CONFIGS, kind, LlamaConfig(**SIZES, **GQA, rope_parameters=rope))
        yield


def assert_same_function(gguf: Path, folder: Path) -> None:
    """Log probabilities of every token after texts of several lengths, within 1e-3 where they reach to -15."""
    with torch.no_grad():
        expected = load_pruned(folder)(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()
    assert expected.min() < -10
    loaded = llamacpp.LlamaCpp(gguf, 320)
    for length in (1, 2, 10, 50, 120):
        found = loaded.next_logprobs(IDS[:length])
        np.testing.assert_allclose(found, expected[length - 1], atol=1e-3, err_msg=f"after {length} tokens")


@pytest.mark.parametrize("kind", [*EXPORTED, *ROPES])
def test_llamacpp_computes_what_torch_computes(kind, tiny, prune, flap, tmp_path):
    """Uneven layers, biases of compensation and the model's own, tied and scaled: in float32 all the way."""
    run = prune(tiny(kind), tmp_path / "run", "--ratio 0.3")
    flap("export", "gguf", "-d", run, "--outtype", "f32")
    assert len(set(open_checkpoint(str(run / "pruned")).shape.layers)) > 1
    assert_same_function(run / "pruned.gguf", run / "pruned")


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2"])
def test_dropped_layers(kind, tiny, prune, flap, tmp_path):
    """A stock folder of two layers, and one of two uneven ones, of which one has no heads."""
    run = prune(tiny(kind), tmp_path / "run", "--ratio 0")
    whole = [(0, "attention"), (0, "mlp")]
    for name, emptied in (("even", whole), ("uneven", [*whole, (1, "attention")])):
        edit_keep(run, *emptied)
        flap("apply", "-d", run, "--compensate", "none")
        flap("export", "gguf", "-d", run, "--outtype", "f32", "-o", run / f"{name}.gguf")
        assert (run / "pruned" / "modeling_flap.py").exists() == (name == "uneven")
        assert open_checkpoint(str(run / "pruned")).shape.num_layers == 2
        assert_same_function(run / f"{name}.gguf", run / "pruned")


@pytest.mark.parametrize("kind", ["llama-biases", "qwen2-tied"])
def test_emptied_modules(kind, tiny, prune, flap, tmp_path):
    """A layer without heads, one without neurons, one without either: what is left of them is a bias."""
    run = prune(tiny(kind), tmp_path / "run", "--ratio 0")
    edit_keep(run, (0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp"))
    flap("apply", "-d", run)
    flap("export", "gguf", "-d", run, "--outtype", "f32")
    layers = open_checkpoint(str(run / "pruned")).shape.layers
    assert (layers[0][1], layers[1][2], layers[2][1:3]) == (1, 8, (1, 8))
    assert_same_function(run / "pruned.gguf", run / "pruned")


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_stored_types(outtype, tiny, prune, flap, tmp_path):
    """Matrices in the type asked, vectors in F32, rows that blocks of 32 do not divide in F16."""
    run = prune(tiny("llama-gqa"), tmp_path / "run", "--ratio 0.3 --round-to 32")
    flap("export", "gguf", "-d", run, "--outtype", outtype)
    wanted = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[outtype]
    folder = open_checkpoint(str(run / "pruned"))
    dense = {tuple(t.shape) for t in folder.tensors.values()}
    for tensor in GGUFReader(run / "pruned.gguf").tensors:
        fits = outtype != "q8_0" or tensor.shape[0] % 32 == 0
        kind = "F32" if len(tensor.shape) == 1 else wanted if fits else "F16"
        assert tensor.tensor_type.name == kind, tensor.name
        assert tuple(int(n) for n in reversed(tensor.shape)) in dense
    assert np.isfinite(llamacpp.LlamaCpp(run / "pruned.gguf", 320).next_logprobs(IDS)).all()


def test_values_beyond_float16_are_refused(tiny, prune, flap, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    model = load_pruned(run / "pruned")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "big")
    AutoTokenizer.from_pretrained(run / "pruned").save_pretrained(tmp_path / "big")
    result = flap("export", "gguf", tmp_path / "big", "-o", tmp_path / "big.gguf", code=1)
    assert "output.weight has values beyond float16: use --outtype bf16 or f32" in result.stderr
    assert [path.name for path in tmp_path.glob("*big*")] == ["big"]
    flap("export", "gguf", tmp_path / "big", "-o", tmp_path / "big.gguf", "--outtype", "bf16")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "qwen3",
            "can't be exported to GGUF: tie_word_embeddings is False, and llama.cpp's openelm knows only True; "
            "llama.cpp's qwen3 has the same sizes in every layer",
        ),
        ("mistral-window", "sliding_window is 5, and llama.cpp's deci knows only None"),
        ("opt", "flap knows no architecture of llama.cpp with per-layer sizes for it"),
    ],
)
def test_what_does_not_fit_is_refused(kind, reason, tiny, prune, flap, tmp_path):
    """Qwen3 for unlike layers and an untied head, the others whatever their sizes."""
    folder = tiny(kind) if kind in CONFIGS else make_family(tmp_path / "dense", kind)
    if kind == "qwen3":
        folder = prune(folder, tmp_path / "run", apply="--compensate none") / "pruned"
    result = flap("export", "gguf", folder, "-o", tmp_path / "x.gguf", code=1)
    assert reason in result.stderr
    assert not (tmp_path / "x.gguf").exists()


def test_other_ropes_activations_and_formats_are_refused(tiny, flap, tmp_path):
    folder = make_tiny(tmp_path / "m", "llama-gqa")
    config = json.loads((folder / "config.json").read_text())
    for change, reason in (
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling yarn"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert reason in flap("export", "gguf", folder, "-o", tmp_path / "x.gguf", code=1).stderr
    assert "the formats are gguf" in flap("export", "onnx", folder, code=2).stderr


def test_cache_and_foreign_files(tiny, prune, flap, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    first = json.loads(flap("export", "gguf", "-d", run, "--json").stdout)
    assert first["bytes"] == (run / "pruned.gguf").stat().st_size
    assert str(tmp_path.parent).encode() not in (run / "pruned.gguf").read_bytes()
    before = (run / "pruned.gguf").stat().st_mtime_ns
    again = flap("export", "gguf", "-d", run, "--json")
    assert "up to date" in again.stderr
    assert json.loads(again.stdout) == first
    assert (run / "pruned.gguf").stat().st_mtime_ns == before
    settings = run / "pruned" / "generation_config.json"
    settings.write_text(settings.read_text().replace('"eos_token_id": 2', '"eos_token_id": 1'))
    assert "written" in flap("export", "gguf", "-d", run).stderr
    assert "up to date" in flap("export", "gguf", "-d", run).stderr
    (run / "pruned.Modelfile").unlink()
    assert "written" in flap("export", "gguf", "-d", run).stderr
    assert (run / "pruned.Modelfile").exists()
    assert "written" in flap("export", "gguf", "-d", run, "--force").stderr
    assert "written" in flap("export", "gguf", "-d", run, "--outtype", "bf16").stderr
    writer = GGUFWriter(run / "pruned.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "flap did not write it" in flap("export", "gguf", "-d", run, code=1).stderr


NUMBERS = " ".join(str(n) for n in range(0, 200_000, 37))
TEXT_TRAPS = NUMBERS + (
    "\n\nIt's 2024: 1234567 + 3.14 = ?  DON'T we'll, they'RE\t\ttabs  and   spaces \n \n\n x"
    "\r\nnaïve Ünïcödé – “quotes” 日本語 テスト 한국어 🙂👍🏽 ﷽ e\u0301 ٣٤٥ №½"
)


def text_of(share: slice) -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())[share]


@pytest.mark.parametrize("kind", [*PRE, "sentencepiece", "gemma"])
def test_llamacpp_splits_text_as_the_tokenizer_does(kind, flap, tmp_path):
    """Every pre-tokenizer that the export knows by its rules, on 200,000 characters and on what trips them.

    The text begins without a space: there transformers' Metaspace adds no second one, sentencepiece does.
    """
    train = text_of(slice(0, 150_000)) + NUMBERS
    tokenizer = byte_level(kind, train) if kind in PRE else sentencepiece_like(train)
    if kind == "gemma":
        gemma_like(tokenizer)
    config = LlamaConfig(**SIZES | {"vocab_size": VOCABULARY + 5}, **GQA)
    modeling.transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    flap("export", "gguf", tmp_path / "m", "-o", tmp_path / "m.gguf")
    loaded = llamacpp.LlamaCpp(tmp_path / "m.gguf", VOCABULARY + 5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in (text_of(slice(-200_000, None)).lstrip(), TEXT_TRAPS):
        ids = tokenizer(text).input_ids
        assert loaded.tokenize(text) == ids
    if kind in PRE:
        chat = [{"role": "user", "content": "Hi"}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert loaded.apply_template(chat) == prompt
        assert loaded.tokenize(prompt) == tokenizer(prompt).input_ids
        assert "<|im_start|>" in tokenizer.convert_ids_to_tokens(loaded.tokenize(prompt))


def test_an_unknown_pretokenizer_is_refused(flap, tmp_path):
    tokenizer = byte_level("gpt-2", text_of(slice(0, 20_000)))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    modeling.transformers.LlamaForCausalLM(CONFIGS["llama-gqa"]).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    result = flap("export", "gguf", tmp_path / "m", "-o", tmp_path / "m.gguf", code=1)
    assert "ids up to" in result.stderr  # 900 tokens, 320 rows
    modeling.transformers.LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": VOCABULARY}, **GQA)).save_pretrained(
        tmp_path / "m"
    )
    result = flap("export", "gguf", tmp_path / "m", "-o", tmp_path / "m.gguf", code=1)
    assert "the pre-tokenizer of its tokenizer.json (Whitespace) is none of: gpt-2, smollm" in result.stderr


def test_modelfile(flap, tmp_path):
    """ChatML in Ollama's form, put together by hand here; no template for a tokenizer without one."""
    for template, folder in ((True, tmp_path / "chat"), (False, tmp_path / "base")):
        tokenizer = byte_level("smollm", text_of(slice(0, 20_000)))
        if not template:
            tokenizer.chat_template = None
        config = LlamaConfig(**SIZES | {"vocab_size": VOCABULARY}, **GQA)
        modeling.transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        flap("export", "gguf", folder, "-o", folder.with_suffix(".gguf"))
    lines = (tmp_path / "base.Modelfile").read_text().splitlines()
    assert lines == ["FROM ./base.gguf", 'PARAMETER stop "<|im_end|>"']
    text = (tmp_path / "chat.Modelfile").read_text()
    ask = "<|im_end|>\n<|im_start|>assistant\n"
    between = "<|im_end|>\n<|im_start|>user\n"
    assert text.startswith(
        'FROM ./chat.gguf\nTEMPLATE """{{ range $i, $_ := .Messages }}'
        '{{ if eq .Role "user" }}{{ if eq $i 0 }}<|im_start|>user\n{{ end }}{{ .Content }}' + ask +
        '{{ else if eq .Role "assistant" }}{{ .Content }}' + between +
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}' + between +
        '{{ end }}{{ end }}"""\n'
    )  # fmt: skip


def test_kquants_advice(tiny):
    shape = open_checkpoint(str(tiny("llama-gqa"))).shape
    even = shape.model_copy(update={"hidden_size": 512, "intermediate_size": 512, "num_key_value_heads": 16,
                                      "num_attention_heads": 32, "layers": (LayerShape(32, 16, 512),) * 3})  # fmt: skip
    assert advice(even) == []
    uneven = even.model_copy(update={"layers": (LayerShape(32, 16, 512), LayerShape(30, 15, 288), LayerShape(0, 0, 7))})
    mlp, attention = advice(uneven)
    assert mlp.startswith("ffn_down of 2 of 3 layers (1, 2) has rows that are no multiple of 256")
    assert "that of 1 of 3 layers (2) in F16" in mlp
    assert "--round-to 256" in mlp
    assert "--round-to 32 only the F16" in mlp
    assert attention.startswith("attn_output of 1 of 3 layers (1)")
    assert "--heads-multiple-of 16" in attention  # a KV group of 2 heads of 8 channels
    single = even.model_copy(update={"num_key_value_heads": 1, "attention_unit": "query_head",
                                     "layers": (LayerShape(3, 1, 512),) * 3})  # fmt: skip
    assert advice(single)[0].startswith("attn_output of every layer has rows that are no multiple of 256")
    few = uneven.model_copy(update={"num_attention_heads": 16, "num_key_value_heads": 8})
    assert "no plan avoids it" in advice(few)[1]


def test_rope_factors_of_a_source_gguf_are_read(tiny, tmp_path):
    """Meta's scaling is recognised from the factors that a GGUF has in place of it; others are refused."""
    meta = LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 32.0, "rope_theta": 500000.0}
    for head_dim in (64, 128):
        assert llama3_parameters(llama3_factors(meta, head_dim), 500000.0) == meta
    write_gguf(tmp_path / "meta.gguf", tiny("llama-gqa"), llama3_factors(meta, 8))
    source = open_checkpoint(str(tmp_path / "meta.gguf"))
    assert source.config["rope_parameters"] == meta
    assert "model.layers.0.self_attn.q_proj.weight" in source.tensors
    dense = open_checkpoint(str(tiny("llama-gqa")))
    assert all(torch.equal(source.read(name), dense.read(name)) for name in dense.tensors)
    write_gguf(tmp_path / "other.gguf", tiny("llama-gqa"), np.array([1, 1, 2, 3], dtype=np.float32))
    with pytest.raises(Exception, match=r"rope_freqs\.weight is not Llama-3's scaling"):
        _ = open_checkpoint(str(tmp_path / "other.gguf")).config


@pytest.fixture(scope="module")
def demo(flap, tmp_path_factory):
    """SmolLM2 pruned by 20%."""
    run = tmp_path_factory.mktemp("demo") / "run"
    flap("calibrate", "-d", run, "--nsamples", 32)
    flap("plan", "-d", run)
    flap("apply", "-d", run)
    return run


def test_the_real_model_at_f16(demo, flap):
    """Perplexity within 1% (0.01% seen), the same next token on 97% (99.4% seen), the same text out."""
    flap("export", "gguf", "-d", demo)
    tokenizer, model = AutoTokenizer.from_pretrained(demo / "pruned"), load_pruned(demo / "pruned")
    loaded = llamacpp.LlamaCpp(demo / "pruned.gguf", 49152)
    expected, found, same = [], [], []
    for row in evaluation_windows("pydoc", tokenizer, 128)[:4]:
        with torch.no_grad():
            logits = model(torch.from_numpy(row)[None]).logits[0, :-1]
        expected.append(logits.log_softmax(-1)[torch.arange(len(row) - 1), torch.from_numpy(row[1:])].numpy())
        logprobs, choices = loaded.read(row.tolist())
        found.append(logprobs)
        same.append(choices == logits.argmax(-1).numpy())
    perplexities = [float(np.exp(-np.mean(values))) for values in (found, expected)]
    print(f"perplexity llama.cpp, torch: {perplexities}; same next token: {np.mean(same):.4f}")
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)
    assert np.mean(same) > 0.97
    prompt = "The for statement is used to"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert loaded.complete(prompt, 8) == tokenizer.decode(answer)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is Python?"}]
    assert loaded.apply_template(chat) == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert loaded.chat(chat, 8)


def test_the_real_model_tokenises_as_it_was_trained(demo, flap):
    """The source GGUF's tokenizer, whole: SmolLM2 takes digits one by one, which transformers drops from a GGUF."""
    flap("export", "gguf", "-d", demo)
    loaded = llamacpp.LlamaCpp(demo / "pruned.gguf", 49152)
    tokenizer = AutoTokenizer.from_pretrained(demo / "pruned")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in (text_of(slice(None)), TEXT_TRAPS):
        assert loaded.tokenize(text) == tokenizer(text).input_ids
