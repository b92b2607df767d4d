"""Slicing, compensation and reloading, shown by equal logits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.edits import edit_keep
from support.models import FEW, load_dense, make_tiny
from support.pruned import CLOSE, IDS, load_pruned, logits, masked_dense, without_flapcli
from transformers import AutoModelForCausalLM

from flapcli.artifacts.plan import load_plan
from flapcli.checkpoints import open_checkpoint
from flapcli.execution.loading import load_model


def test_a_tokenizer_model_alone_is_read(tiny, tmp_path):
    """As older checkpoints have it: sentencepiece's file, without tokenizer.json."""
    import sentencepiece

    folder = shutil.copytree(tiny("llama-gqa"), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = open_checkpoint(str(folder)).load_tokenizer()
    assert tokenizer.decode(tokenizer("the lazy fox").input_ids, skip_special_tokens=True) == "the lazy fox"


@pytest.fixture(scope="module", params=FEW)
def pruned(request, tiny, prune, tmp_path_factory):
    """Every family pruned by 30%: the dense folder and the run folder."""
    dense = tiny(request.param)
    return dense, prune(dense, tmp_path_factory.mktemp("run") / request.param, "--ratio 0.3")


def test_sliced_equals_masked(pruned):
    dense, run = pruned
    sliced = load_pruned(run / "pruned")
    torch.testing.assert_close(logits(sliced), logits(masked_dense(dense, run)), **CLOSE)
    kept = load_plan(run / "plan.yaml").parameters
    checkpoint = open_checkpoint(str(run / "pruned"))
    assert kept.kept < 0.71 * kept.prunable
    had_biases = "llama-biases" in str(run)
    added = 0 if had_biases else 2 * sliced.config.num_hidden_layers * sliced.config.hidden_size
    assert checkpoint.shape.parameters == kept.model_after + added


def test_mask_only_equals_sliced(pruned, flap):
    _, run = pruned
    flap("apply", "-d", run, "--mask-only", "--out", run / "masked")
    torch.testing.assert_close(logits(load_pruned(run / "masked")), logits(load_pruned(run / "pruned")), **CLOSE)
    shapes = {n: s.shape for n, s in open_checkpoint(str(run / "masked")).tensors.items()}
    dense = open_checkpoint(str(pruned[0])).tensors
    assert all(shapes[name] == spec.shape for name, spec in dense.items())


def test_without_compensation(pruned, flap):
    dense, run = pruned
    flap("apply", "-d", run, "--compensate", "none", "--out", run / "none")
    assert (logits(load_pruned(run / "none")) - logits(load_pruned(run / "pruned"))).abs().max() > 1e-2
    torch.testing.assert_close(logits(load_pruned(run / "none")), logits(masked_dense(dense, run, bias=False)), **CLOSE)


@pytest.mark.parametrize("pruned", ["llama-biases"], indirect=True)
def test_reloads_without_flapcli(pruned, tmp_path):
    """from_pretrained with trust_remote_code in a process that can't import flapcli; save and reload; generate."""
    _, run = pruned
    code = f"""
model = load({str(run / "pruned")!r})
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, plain)
    model.save_pretrained({str(tmp_path / "again")!r})
    torch.testing.assert_close(load({str(tmp_path / "again")!r})(ids).logits, expected, rtol=1e-6, atol=1e-6)
AutoTokenizer.from_pretrained({str(run / "pruned")!r})("the quick brown fox")
"""
    without_flapcli(code, logits(load_pruned(run / "pruned")), tmp_path)


def test_pruning_nothing_reproduces_the_dense_model(any_tiny, prune, tmp_path):
    run = prune(any_tiny, tmp_path / "run", "--ratio 0")
    torch.testing.assert_close(logits(load_pruned(run / "pruned")), logits(load_dense(any_tiny)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compensate", ["bias", "none"])
@pytest.mark.parametrize("kind", ["qwen3"])
def test_emptied_modules(kind, compensate, tiny, prune, flap, tmp_path):
    """Layers without heads (the first among them, whose cache counts the tokens) and without neurons."""
    run = prune(tiny(kind), tmp_path / "run", "--ratio 0")
    edit_keep(run, (0, "attention"), (1, "mlp"), (2, "attention"))
    heads = load_plan(run / "plan.yaml").layers[1].attention.of
    assert load_plan(run / "plan.yaml").counts("attention") == [0, heads, 0]
    flap("apply", "-d", run, "--compensate", compensate)
    model = load_pruned(run / "pruned")
    expected = masked_dense(tiny(kind), run, bias=compensate == "bias")
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    with pytest.raises(RuntimeError, match="mismatch"):  # where no other shape would stop the dense model's class
        AutoModelForCausalLM.from_pretrained(run / "pruned")
    sequences = {
        cache: model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    }
    assert torch.equal(sequences[True], sequences[False])
    model.save_pretrained(tmp_path / "again")
    without_marks(tmp_path / "again")
    for old in (load_pruned(tmp_path / "again"), load_checked(tmp_path / "again")):
        torch.testing.assert_close(logits(old), logits(model), rtol=1e-6, atol=1e-6)


def without_marks(folder):
    """As older versions wrote it: nothing is stored of an emptied module's weight."""
    weights = load_file(folder / "model.safetensors")
    marks = [name for name, tensor in weights.items() if tensor.numel() == 0]
    assert len(marks) == 3
    kept = {name: tensor for name, tensor in weights.items() if name not in marks}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def load_checked(folder):
    """By flap's own loader, which refuses gaps."""
    return load_model(open_checkpoint(folder), torch.float32, torch.device("cpu"))


def test_an_edited_plan_is_applied(tiny, prune, flap, tmp_path):
    run = prune(tiny("llama-mha"), tmp_path / "run", "--ratio 0")
    path = run / "plan.yaml"
    path.write_text(path.read_text().replace('keep: "0-5"', 'keep: "1,3-4"', 1))
    flap("apply", "-d", run)
    weights = load_file(run / "pruned" / "model-00001-of-00001.safetensors")
    dense = load_file(tiny("llama-mha") / "model.safetensors")
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[q], dense[q].view(6, 8, 48)[[1, 3, 4]].flatten(0, 1))
    torch.testing.assert_close(
        logits(load_pruned(run / "pruned")), logits(masked_dense(tiny("llama-mha"), run)), **CLOSE
    )


def test_shards_dtype_and_contents(tmp_path, prune, flap):
    """Sharded bfloat16 source: shards within the limit, index right, dtype kept, and float16 on request."""
    dense = make_tiny(tmp_path / "dense", "llama-gqa", shard="40KB", dtype=torch.bfloat16)
    assert (dense / "model.safetensors.index.json").exists()
    run = prune(dense, tmp_path / "run", "--ratio 0.3", "--max-shard-size 50KB")
    folder = run / "pruned"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 2
    assert all(file.stat().st_size < 50_000 + 10_000 for file in files)
    assert set(index["weight_map"]) == set(loaded)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in loaded.values())
    assert {t.dtype for t in loaded.values()} == {torch.bfloat16}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "plan.yaml",
              "README.md", "modeling_flap.py", "model.safetensors.index.json"}  # fmt: skip
    assert wanted <= {path.name for path in folder.iterdir()}
    flap("apply", "-d", run, "--dtype", "float16", "--out", tmp_path / "half")
    half = {n: s.dtype for n, s in open_checkpoint(str(tmp_path / "half")).tensors.items()}
    assert set(half.values()) == {"F16"}


def test_config_says_what_the_contract_says(pruned):
    dense, run = pruned
    config = json.loads((run / "pruned" / "config.json").read_text())
    before = json.loads((dense / "config.json").read_text())
    plan = load_plan(run / "plan.yaml")
    for key in ("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert config[key] == before[key]
    group = before["num_attention_heads"] // before["num_key_value_heads"]
    flap_part = config["flap"]
    assert flap_part["num_key_value_heads"] == plan.counts("attention")
    assert flap_part["num_attention_heads"] == [n * group for n in plan.counts("attention")]
    assert flap_part["intermediate_size"] == plan.counts("mlp")
    assert flap_part["biases"] == ["mlp.down_proj", "self_attn.o_proj"]


def test_a_second_round_prunes_what_is_pruned(tiny, prune, tmp_path):
    first = prune(tiny("qwen2"), tmp_path / "one", "--ratio 0.3")
    second = prune(first / "pruned", tmp_path / "two", "--ratio 0.4")
    once, twice = (open_checkpoint(str(run / "pruned")).shape for run in (first, second))
    assert sum(layer.intermediate_size for layer in twice.layers) < sum(
        layer.intermediate_size for layer in once.layers
    )
    plan = load_plan(second / "plan.yaml")
    assert [layer.mlp.of for layer in plan.layers] == [layer.intermediate_size for layer in once.layers]
    same = prune(first / "pruned", tmp_path / "three", "--ratio 0")
    torch.testing.assert_close(
        logits(load_pruned(same / "pruned")), logits(load_pruned(first / "pruned")), rtol=1e-6, atol=1e-6
    )
