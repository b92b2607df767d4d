"""Slicing, compensation and reloading, shown by equal logits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.edits import edit_keep
from support.models import FEW, load_dense, make_tiny
from support.pruned import CLOSE, IDS, load_pruned, logits, masked_dense, without_flapcli
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from flapcli.architecture.family import PER_LAYER
from flapcli.architecture.shape import OWN_SIZES
from flapcli.artifacts.plan import load_plan
from flapcli.checkpoints import open_checkpoint
from flapcli.errors import FlapError


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
    """In the dense model's shapes; where its class would leave out the biases, one module stops it."""
    dense, run = pruned
    flap("apply", "-d", run, "--mask-only", "--out", run / "masked")
    torch.testing.assert_close(logits(load_pruned(run / "masked")), logits(load_pruned(run / "pruned")), **CLOSE)
    shapes = {n: s.shape for n, s in open_checkpoint(str(run / "masked")).tensors.items()}
    other = {n for n, spec in open_checkpoint(str(dense)).tensors.items() if shapes[n] != spec.shape}
    if not (run / "masked" / "modeling_flap.py").exists():
        assert not other
        return
    assert other == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(run / "masked")


def test_other_engines_read_the_sizes(pruned):
    """As vLLM does: the model without its head from the configuration, whose layers' own say heads and widths."""
    _, run = pruned
    config = AutoConfig.from_pretrained(run / "pruned")
    model = AutoModel.from_config(config, trust_remote_code=True)
    stored = {n.removeprefix("model."): s.shape for n, s in open_checkpoint(str(run / "pruned")).tensors.items()}
    stored.pop("lm_head.weight", None)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == stored
    told = [(c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) for c in config.per_layer_config]
    flap_part = config.flap
    assert told == [*zip(*(flap_part[size] for size in OWN_SIZES), strict=True)]
    assert {c.head_dim for c in config.per_layer_config} == {open_checkpoint(str(run / "pruned")).shape.head_dim}
    raw = json.loads((run / "pruned" / "config.json").read_text())["per_layer_config"]
    assert all(value != getattr(config, key) for layer in raw.values() for key, value in layer.items())
    assert [layer[2] for layer in told] == load_plan(run / "plan.yaml").counts("mlp")


def test_the_model_without_its_head(pruned):
    _, run = pruned
    bare = AutoModel.from_pretrained(run / "pruned", trust_remote_code=True, dtype=torch.float32).eval()
    assert type(bare).__name__.startswith("Flap")
    with torch.no_grad():
        expected = load_pruned(run / "pruned").base_model(IDS)[0]
        torch.testing.assert_close(bare(IDS)[0], expected, **CLOSE)


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
    assert (model.config.flap["num_key_value_heads"], model.config.flap["intermediate_size"][1]) == ([1, heads, 1], 8)
    for output in (model.model.layers[0].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        assert not output.weight.any()
    written = load_plan(run / "plan.yaml").parameters.model_after + (compensate == "bias") * 2 * 3 * 48
    assert written == model.config.flap["parameters"]
    expected = masked_dense(tiny(kind), run, bias=compensate == "bias")
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    with pytest.raises(RuntimeError, match="mismatch"):  # where no other shape would stop the dense model's class
        AutoModelForCausalLM.from_pretrained(run / "pruned")
    sequences = {
        cache: model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    }
    assert torch.equal(sequences[True], sequences[False])
    config = json.loads((run / "pruned" / "config.json").read_text())
    config["flap"]["intermediate_size"][1] = 0
    (run / "pruned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlapError, match="layer 1 has no neuron of its mlp, as older versions of flap wrote it: prune"):
        open_checkpoint(run / "pruned").shape  # noqa: B018


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


def test_a_second_round_says_its_own_sizes_alone(tiny, prune, flap, tmp_path):
    """Uneven again, or even: then the folder is stock and says nothing of single layers."""
    run = prune(tiny("llama-gqa"), tmp_path / "one")
    edit_keep(run, (1, "attention"), keep="0")
    flap("apply", "-d", run)
    again = prune(run / "pruned", tmp_path / "two", "--ratio 0.2")
    one, two = (AutoConfig.from_pretrained(path / "pruned") for path in (run, again))
    told = [layer.intermediate_size for layer in two.per_layer_config]
    assert told == two.flap["intermediate_size"] != one.flap["intermediate_size"]
    said = json.loads((again / "pruned" / "config.json").read_text())["per_layer_config"]
    assert all(sizes == {key: two.flap[key][int(place)] for key in sizes} for place, sizes in said.items())
    for layer in range(3):
        edit_keep(again, (layer, "attention"), keep="0")
        edit_keep(again, (layer, "mlp"), keep="0-9")
    flap("apply", "-d", again)
    config = json.loads((again / "pruned" / "config.json").read_text())
    assert not config.keys() & {*PER_LAYER, "auto_map"}
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(again / "pruned")),
        logits(masked_dense(run / "pruned", again)), **CLOSE,
    )  # fmt: skip
