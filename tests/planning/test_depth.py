"""Block influence, plans that drop whole layers, and the stock checkpoints of fewer layers that they make."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.edits import edit_keep
from support.measured import measure
from support.models import CONFIGS, GQA, SIZES, load_dense, load_tokenizer, make_tiny
from support.pruned import CLOSE, load_pruned, logits, masked_dense
from transformers import AutoModelForCausalLM, LlamaConfig

from flapcli.architecture.shape import MODULES
from flapcli.artifacts.eval_report import load_report
from flapcli.artifacts.plan import format_ranges, load_plan
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint
from flapcli.progress import Silent
from flapcli.storage.json_file import read_json
from flapcli.texts.corpus import calibration_windows


def test_block_influence_is_what_hidden_states_say(any_tiny, text_file):
    """Whatever the batch size, of layers by transformers' own hidden states, of modules by the residual additions."""
    windows = calibration_windows(str(text_file), load_tokenizer(any_tiny), 12, 24, 0)
    cpu, checkpoint = torch.device("cpu"), open_checkpoint(str(any_tiny))
    model = load_dense(any_tiny)
    attended: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, output: attended.append(output[0]))
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    with torch.no_grad():
        states = model(torch.from_numpy(windows), output_hidden_states=True).hidden_states
    streams = [*states[:-1], last[0]]  # transformers norms the last one
    for batch_size in (None, 5):
        measured = measure(checkpoint, windows, cpu, torch.float32, batch_size, False, Silent())
        for i, found in enumerate(measured.influences):
            before, middle, after = streams[i], streams[i] + attended[i], streams[i + 1]
            wanted = [1 - cosine(*pair) for pair in ((before, after), (before, middle), (middle, after))]
            np.testing.assert_allclose(found, wanted, rtol=1e-4)


def cosine(one, two):
    return torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=-1).mean().item()


def drop(run, *gone):
    """Edits the plan so that layers `gone` keep nothing."""
    edit_keep(run, *itertools.product(gone, MODULES))


def skipping(folder, *gone):
    """The dense model as transformers has it, in which layers `gone` pass their input on."""
    model = load_dense(folder)
    for layer in gone:
        model.model.layers[layer].forward = lambda hidden_states, **_: hidden_states
    return model


def load_stock(folder):
    """By transformers alone; no tensor missing, none to spare."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 2)])
@pytest.mark.parametrize("kind", ["llama-gqa", "mistral-window", "qwen2-window"])
def test_dropped_layers_leave_a_stock_checkpoint(kind, gone, tiny, prune, flap, tmp_path):
    """Equal to the dense model without those layers, with a cache and without; masked in place it is the same."""
    run = prune(tiny(kind), tmp_path / "run", "--ratio 0")
    drop(run, *gone)
    said = flap("apply", "-d", run, "--compensate", "none").stderr
    assert f"layers that keep nothing leave the checkpoint: {format_ranges(gone)}; {3 - len(gone)} of 3 stay" in said
    assert not (run / "pruned" / "modeling_flap.py").exists()
    model = load_stock(run / "pruned")
    assert model.config.num_hidden_layers == len(model.model.layers) == 3 - len(gone)
    ids = torch.tensor([list(range(3, 33)), list(range(40, 70))])  # beyond every sliding window
    torch.testing.assert_close(model(ids).logits, skipping(tiny(kind), *gone)(ids).logits, rtol=1e-6, atol=1e-6)
    flap("apply", "-d", run, "--compensate", "none", "--mask-only", "--out", run / "masked")
    torch.testing.assert_close(model(ids).logits, load_stock(run / "masked")(ids).logits, rtol=1e-5, atol=1e-5)
    sequences = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*sequences)


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-biases", "qwen3"])
def test_layers_whose_bias_acts_stay(kind, tiny, prune, flap, tmp_path):
    """Compensation's bias, and the model's own, are what is left of a layer without units."""
    run = prune(tiny(kind), tmp_path / "run", "--ratio 0")
    drop(run, 1)
    compensations = ["bias"] + ["none"] * (kind == "llama-biases")
    for compensate in compensations:
        said = flap("apply", "-d", run, "--compensate", compensate).stderr
        assert "layers that keep no unit stay as their biases alone, which go on acting: 1" in said
        model = load_pruned(run / "pruned")
        assert model.config.num_hidden_layers == 3
        expected = masked_dense(tiny(kind), run, bias=compensate == "bias")
        torch.testing.assert_close(logits(model), logits(expected), **CLOSE)


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-head-dim", "qwen2-window", "qwen3"])
def test_depth_and_width_together(kind, tiny, prune, flap, tmp_path):
    """Uneven layers of which one is dropped: still our own class, its layers and what is said of them moved up."""
    run = prune(tiny(kind), tmp_path / "run", "--ratio 0.3")
    whole = logits(load_pruned(run / "pruned"))
    drop(run, 1)
    flap("apply", "-d", run, "--compensate", "none")
    model = load_pruned(run / "pruned")
    assert (run / "pruned" / "modeling_flap.py").exists()
    torch.testing.assert_close(logits(model), logits(masked_dense(tiny(kind), run, bias=False)), **CLOSE)
    assert (logits(model) - whole).abs().max() > 1e-2
    plan = load_plan(run / "plan.yaml")
    assert model.config.flap["intermediate_size"] == [plan.counts("mlp")[0], plan.counts("mlp")[2]]
    assert model.config.flap["source_layers"] == [0, 2]
    ids = torch.tensor([list(range(3, 33))])
    sequences = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*sequences)


def test_least_squares_beside_dropped_layers(tiny, flap, text_file, tmp_path):
    """Without biases a layer goes; the errors said of the others are theirs."""
    model, run = tiny("llama-gqa"), tmp_path / "run"
    flap("calibrate", model, "-d", run, "--dataset", text_file, "--nsamples", 12, "--seqlen", 24, "--gram")
    flap("plan", "-d", run, "--ratio", 0.3)
    lstsq = ("apply", "-d", run, "--compensate", "lstsq", "--no-bias")
    flap(*lstsq, "--out", run / "whole")
    drop(run, 1)
    flap(*lstsq)
    whole, dropped = (read_json(run / folder / "config.json", "")["flap"] for folder in ("whole", "pruned"))
    for module in MODULES:
        errors = whole["output_error"][module]
        assert dropped["output_error"][module] == [errors[0], errors[2]]
    states = [open_checkpoint(str(run / folder)) for folder in ("whole", "pruned")]
    for suffix in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        moved = [state.read(f"model.layers.{i}.{suffix}") for state, i in zip(states, (2, 1), strict=True)]
        assert torch.equal(*moved)


def test_where_no_layer_would_stay_all_do(tiny, prune, flap, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run", "--ratio 0")
    drop(run, 0, 1, 2)
    flap("apply", "-d", run, "--compensate", "none")
    expected = masked_dense(tiny("llama-gqa"), run, bias=False)
    torch.testing.assert_close(logits(load_pruned(run / "pruned")), logits(expected), **CLOSE)


@pytest.fixture(scope="module")
def deep(tmp_path_factory, text_file, flap):
    """A calibrated run of a model of 30 small layers."""
    folder, run = tmp_path_factory.mktemp("deep"), tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "deep", LlamaConfig(**SIZES | {"num_hidden_layers": 30}, **GQA))
        make_tiny(folder, "deep")
    flap("calibrate", folder, "-d", run, "--dataset", text_file, "--nsamples", 4, "--seqlen", 16, "--dtype", "float32")
    return folder, run


@pytest.mark.parametrize(("ratio", "count"), [(0, 0), (0.01, 1), (0.2, 6), (0.3, 9), (0.5, 15), (0.51, 16), (0.95, 29)])
def test_the_fewest_layers_of_least_influence_go(ratio, count, deep, flap, tmp_path):
    stats = load_stats(deep[1] / "stats.safetensors")
    flap("plan", "-d", deep[1], "--method", "depth", "--ratio", ratio, "--out", tmp_path / "plan.yaml")
    plan = load_plan(tmp_path / "plan.yaml")
    lowest = sorted(range(30), key=lambda i: stats.influences[i].layer)[:count]
    gone = [i for i in range(30) if not (len(plan.kept(i, "attention")) or len(plan.kept(i, "mlp")))]
    assert gone == sorted(lowest)
    assert {(*layer.attention.keep, *layer.mlp.keep) for i, layer in enumerate(plan.layers) if i not in gone} == {
        (*"0-2", *"0-55")
    }
    assert (plan.method, plan.metric, plan.structure) == ("depth", "block-influence", "layers")
    assert plan.ratio.achieved == round(count / 30, 6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--metric WIFV", "--metric WIFV: --method depth is defined with block-influence"),
        ("--structure AL-AM", "--structure AL-AM: --method depth is defined with layers"),
        ("--remove-heads 2", "--remove-heads: --method depth drops whole layers"),
        ("--round-to 8", "leave --round-to out"),
        ("--heads-multiple-of 2", "leave --heads-multiple-of out"),
        ("--attention-exponent 2", "leave --attention-exponent out"),
        ("--ratio 0.97", "it takes all 30 layers to reach it, and one must stay"),
    ],
)
def test_options_of_width_are_refused(options, reason, deep, flap, tmp_path):
    result = flap("plan", "-d", deep[1], "--method", "depth", *options.split(), "--out", tmp_path / "p.yaml", code=2)
    assert reason in result.stderr
    assert not (tmp_path / "p.yaml").exists()


def test_statistics_of_an_older_flap(deep, flap, tmp_path):
    """Without block influence: width is planned as ever, depth says what to do. With a part of it: corrupt."""
    path = deep[1] / "stats.safetensors"
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    influence = [name for name in tensors if name.endswith("block_influence")]
    assert len(influence) == 90
    for name in influence:
        assert tensors[name].shape == (1,)
    old = {name: value for name, value in tensors.items() if name not in influence}
    save_file(old, tmp_path / "stats.safetensors", metadata)
    plans = [flap("plan", "-d", run, "--json", "--out", tmp_path / "p.yaml", "--force") for run in (deep[1], tmp_path)]
    layers = [json.loads(plan.stdout)["layers"] for plan in plans]
    assert layers[0] == layers[1]
    said = flap("plan", "-d", tmp_path, "--method", "depth", code=1).stderr
    assert "lacks block influence, which --method depth needs: run `flap calibrate --force`" in " ".join(said.split())
    save_file(old | {influence[0]: tensors[influence[0]]}, tmp_path / "stats.safetensors", metadata)
    assert "is corrupt" in flap("plan", "-d", tmp_path, code=1).stderr


def test_every_command_takes_a_folder_of_fewer_layers(tiny, flap, text_file, tmp_path):
    """run, show, the card, the cache, eval with baseline and speed, streamed too, compare, diff, a second round."""
    run, folder = tmp_path / "run", tmp_path / "run" / "pruned"
    small = ["--dataset", text_file, "--nsamples", 8, "--seqlen", 16, "--dtype", "float32"]
    measured = ["--perplexity", text_file, "--eval-dtype", "float32"]
    flap("run", tiny("qwen3"), "-d", run, *small, *measured, "--method", "depth", "--ratio", 0.3)
    config = load_stock(folder).config
    [gone] = {0, 1, 2} - set(config.flap["source_layers"])
    assert config.flap["biases"] == []
    torch.testing.assert_close(logits(load_stock(folder)), logits(skipping(tiny("qwen3"), gone)), rtol=1e-6, atol=1e-6)
    parameters = open_checkpoint(str(folder)).shape.parameters
    card = (folder / "README.md").read_text()
    assert "decoder layers of least block influence" in card
    assert "| layers | 2 of 3; the others are dropped whole |" in card
    assert f"| parameters after | {parameters:,} |" in card
    assert "A stock checkpoint" in card
    kept = format_ranges(config.flap["source_layers"])
    assert f"2 of the dense model's: {kept}" in flap("show", folder).stdout
    assert "up to date" in flap("apply", "-d", run).stderr
    report = load_report(run / "eval.json")
    assert report.size.parameters == parameters < report.baseline.size.parameters
    streamed = ["--stream", "--dtype", "float32", "--seqlen", 16, "--perplexity", text_file]
    flap("eval", "-d", run, *streamed, "--no-baseline", "--force", "--out", tmp_path / "streamed.json")
    found = load_report(tmp_path / "streamed.json").perplexity
    assert found == pytest.approx(report.perplexity, rel=1e-5)
    flap("eval", "-d", run, "--speed", "--speed-rounds", 1, "--speed-lengths", 8, "--speed-new-tokens", 2)
    assert load_report(run / "eval.json").speedup
    flap("plan", "-d", run, "--out", tmp_path / "width.yaml")
    assert json.loads(flap("diff", run, tmp_path / "width.yaml", "--json").stdout)["settings"]["method"] == [
        "depth",
        "flap",
    ]
    flap("compare", run, run)
    flap("report", "-d", run)
    flap("run", folder, "-d", tmp_path / "again", *small, *measured, "--method", "depth", "--ratio", 0.5)
    assert load_stock(tmp_path / "again" / "pruned").config.num_hidden_layers == 1
