"""What holds for every description of a family, on a tiny random model of each and of its variants."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.edits import edit_keep
from support.families import FAMILY_CONFIGS, make_family
from support.models import load_dense
from support.pruned import CLOSE, IDS, load_pruned, logits, masked_dense, step_by_step, without_flapcli
from transformers import AutoConfig

from flapcli.architecture.family import families, family_of, refused_families
from flapcli.architecture.shape import MODULES
from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint
from flapcli.errors import FlapError
from flapcli.evaluation.perplexity import streamed_losses, window_losses
from flapcli.execution.device import Runtime
from flapcli.execution.loading import load_model
from flapcli.progress import Silent

RUNS: dict[str, Path] = {}  # what has been pruned so far
CPU = torch.device("cpu")
SMALL = ["--nsamples", "8", "--seqlen", "16", "--dtype", "float32"]


def test_every_description_has_a_model():
    assert {kind for kind, _ in FAMILY_CONFIGS.values()} == set(families())


@pytest.fixture(scope="module", params=FAMILY_CONFIGS)
def made(request, tmp_path_factory, flap, text_file):
    """A dense folder, and a run folder with statistics and an uneven plan of it."""
    folder = tmp_path_factory.mktemp(request.param)
    dense, run = make_family(folder / "dense", request.param), folder / "run"
    flap("calibrate", dense, "-d", run, "--dataset", text_file, *SMALL, "--gram")
    flap("plan", "-d", run, "--ratio", "0.3")
    flap("apply", "-d", run)
    RUNS[request.param] = run
    return dense, run


def padded(model):
    """Logits of a batch of which one text is shorter, padded on the left."""
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with torch.no_grad():
        return model(IDS, attention_mask=mask).logits[:, 4:]


def assert_says_its_sizes(folder):
    """In transformers' words, as far as it has any for the family."""
    config = AutoConfig.from_pretrained(folder)
    layers, flap_part, keys = config.per_layer_config, config.flap, open_checkpoint(str(folder)).family.sizes
    if isinstance(keys.get("intermediate_size"), str) and all(flap_part["intermediate_size"]):
        assert [getattr(c, keys["intermediate_size"]) for c in layers] == flap_part["intermediate_size"]
    if not isinstance(getattr(type(config), "head_dim", None), property):
        assert [c.num_attention_heads for c in layers] == flap_part["num_attention_heads"]
        groups = [getattr(c, "num_key_value_heads", None) or c.num_attention_heads for c in layers]
        assert groups == flap_part["num_key_value_heads"] or keys.get("num_key_value_heads") == 1


def counted(folder, dense):
    """Parameters of a folder without the biases that compensation added."""
    checkpoint, before = open_checkpoint(str(folder)), open_checkpoint(str(dense)).tensors
    added = sum(spec.shape[0] for name, spec in checkpoint.tensors.items() if name not in before)
    return checkpoint.shape.parameters - added


def test_sliced_equals_masked(made, flap):
    dense, run = made
    sliced, expected = load_pruned(run / "pruned"), masked_dense(dense, run)
    plan = load_plan(run / "plan.yaml")
    assert len(set(zip(*map(plan.counts, plan.modules), strict=True))) > 1
    assert plan.parameters.kept < 0.75 * plan.parameters.prunable
    torch.testing.assert_close(logits(sliced), logits(expected), **CLOSE)
    torch.testing.assert_close(step_by_step(sliced), logits(sliced)[:, 4:], **CLOSE)
    torch.testing.assert_close(padded(sliced), padded(expected), **CLOSE)
    assert_says_its_sizes(run / "pruned")
    assert counted(run / "pruned", dense) == plan.parameters.model_after


def test_streamed_equals_in_memory(made, flap, text_file):
    dense, run = made
    flap("calibrate", dense, "--out", run / "streamed.safetensors", "--dataset", text_file, *SMALL, "--stream")
    one, other = load_stats(run / "stats.safetensors"), load_stats(run / "streamed.safetensors")
    for key, values in one.modules.items():
        for name in values.__dataclass_fields__:
            torch.testing.assert_close(
                torch.from_numpy(getattr(values, name)), torch.from_numpy(getattr(other.modules[key], name)),
                rtol=1e-4, atol=1e-6,
            )  # fmt: skip


def test_nothing_pruned_gives_the_dense_logits(made, flap):
    dense, run = made
    flap("plan", "-d", run, "--out", run / "nothing.yaml", "--ratio", "0")
    flap("apply", "-d", run, "--plan", run / "nothing.yaml", "--out", run / "whole")
    torch.testing.assert_close(logits(load_pruned(run / "whole")), logits(load_dense(dense)), rtol=1e-5, atol=1e-5)


def test_emptied_modules(made, flap):
    """Layers without heads, the first among them, whose cache counts the tokens, and without neurons."""
    dense, run = made
    one = run / "emptied"
    flap("plan", "-d", run, "--out", one / "plan.yaml", "--ratio", "0")
    feed_forward = load_plan(one / "plan.yaml").modules[1:]
    edit_keep(one, (0, "attention"), (2, "attention"), *((1, module) for module in feed_forward))
    flap("apply", "-d", run, "--plan", one / "plan.yaml", "--out", one / "pruned")
    sliced, expected = load_pruned(one / "pruned"), masked_dense(dense, one, stats=run / "stats.safetensors")
    torch.testing.assert_close(logits(sliced), logits(expected), **CLOSE)
    torch.testing.assert_close(step_by_step(sliced), logits(sliced)[:, 4:], **CLOSE)
    if "experts" not in feed_forward:  # whose own output biases, which go with them, no plan counts
        assert counted(one / "pruned", dense) == load_plan(one / "plan.yaml").parameters.model_after
    checked = load_model(open_checkpoint(one / "pruned"), torch.float32, CPU)
    torch.testing.assert_close(logits(checked), logits(sliced), rtol=1e-6, atol=1e-6)


def even_experts(shape, layer):
    """All experts but the second, where one can go, and all but eight neurons of each."""
    count, size = shape.layers[layer].num_experts, shape.layers[layer].expert_size
    stay = [expert for expert in range(count) if expert != 1 or shape.every_expert]
    return ",".join(f"{expert * size}-{(expert + 1) * size - 9}" for expert in stay)


def test_stock_where_even(made, flap):
    """What every layer keeps alike is a folder of the family's own class, wherever its configuration can say it."""
    dense, run = made
    one = run / "even"
    kept = {"attention": "0,2,3,5", "mlp": "0-39"}
    flap("plan", "-d", run, "--out", one / "plan.yaml", "--ratio", "0")
    unit = load_plan(one / "plan.yaml").layers[0].attention
    kept["attention"] = "0,2" if unit.of == 3 else kept["attention"]
    if open_checkpoint(str(dense)).shape.whole:
        kept["attention"] = unit.keep
    for layer in range(3):
        for module in MODULES:
            if load_plan(one / "plan.yaml").layers[layer].module(module).of:
                edit_keep(one, (layer, module), keep=kept[module])
        if (shape := open_checkpoint(str(dense)).shape).layers[layer].num_experts:
            edit_keep(one, (layer, "experts"), keep=even_experts(shape, layer))
        if shared := shape.layers[layer].shared_expert_size:  # in proportion, as some configurations want it
            size = shape.layers[layer].expert_size
            edit_keep(one, (layer, "shared_expert"), keep=f"0-{shared * (size - 8) // size - 1}")
    flap("apply", "-d", run, "--plan", one / "plan.yaml", "--out", one / "pruned", "--compensate", "none")
    config = json.loads((one / "pruned" / "config.json").read_text())
    family = open_checkpoint(str(dense)).family
    sayable = {"intermediate_size"} if family.attention.stays_whole else {"head_dim", "intermediate_size"}
    assert ("auto_map" not in config) == (sayable <= family.sizes.keys())
    expected = masked_dense(dense, one, False, run / "stats.safetensors")
    torch.testing.assert_close(logits(load_pruned(one / "pruned")), logits(expected), **CLOSE)


def test_what_stays_whole_is_not_cut(tmp_path, flap, text_file):
    """No unit of olmo2's attention is planned to go nor counted, and an edited plan that cuts it is refused."""
    dense = make_family(tmp_path / "dense", "olmo2")
    flap("calibrate", dense, "-d", tmp_path, "--dataset", text_file, *SMALL)
    flap("plan", "-d", tmp_path, "--structure", "UL-MM", "--remove-heads", "3", code=2)
    flap("plan", "-d", tmp_path, "--ratio", "0.3")
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.counts("attention") == [3] * 3
    assert plan.ratio.achieved == pytest.approx(0.3, abs=0.01)
    assert plan.parameters.prunable == 3 * 56 * 3 * 48
    edit_keep(tmp_path, (1, "attention"), keep="0,2")
    told = flap("apply", "-d", tmp_path, code=1).stderr
    assert "layer 1, attention: all its units stay or none, since its norms of queries and keys" in told


def test_families_that_cannot_be_pruned_say_why():
    for name in refused_families():
        with pytest.raises(FlapError, match=f"model_type {name} can't be pruned: its"):
            family_of(name, {}.get, "a model")


def test_streamed_losses_are_the_models_own(made):
    """Scales, caps and biases of heads included; of the sliced folder, so that its layers are streamed too."""
    checkpoint = open_checkpoint(str(made[1] / "pruned"))
    windows = np.random.default_rng(0).integers(0, checkpoint.vocabulary, (6, 24))
    model = load_model(checkpoint, torch.float32, CPU)
    streamed = streamed_losses(checkpoint, windows, Runtime(CPU, torch.float32, 4), Silent(), "streamed")
    np.testing.assert_allclose(streamed, window_losses(model, windows, 4, Silent()), rtol=1e-5)


def test_the_best_preset_fits(made, flap):
    """One projection after the other where the family's layers allow it, else in closed form, which is said."""
    dense, run = made
    said = flap("apply", "-d", run, "--out", run / "best", "--preset", "best").stderr
    fits = open_checkpoint(str(dense)).family.fits_sequentially
    assert ("--sequential is left out" in said) == (not fits)
    assert json.loads((run / "best" / "config.json").read_text())["flap"]["made_by"]["sequential"] == fits


def test_second_round(made, flap, text_file):
    """A pruned folder is calibrated and pruned again, its layers' own sizes being those that count."""
    _, run = made
    again = run / "again"
    flap("calibrate", run / "pruned", "-d", again, "--dataset", text_file, *SMALL)
    flap("plan", "-d", again, "--ratio", "0.3")
    flap("apply", "-d", again)
    sliced, expected = load_pruned(again / "pruned"), masked_dense(run / "pruned", again)
    torch.testing.assert_close(logits(sliced), logits(expected), **CLOSE)
    torch.testing.assert_close(step_by_step(sliced), logits(sliced)[:, 4:], **CLOSE)


def test_a_layer_that_keeps_nothing(made, flap):
    """It leaves the checkpoint where nothing of it acts: lists of layers follow, and what it computes stays."""
    dense, run = made
    one = run / "dropped"
    flap("plan", "-d", run, "--out", one / "plan.yaml", "--ratio", "0")
    edit_keep(one, *((1, module) for module in load_plan(one / "plan.yaml").modules))
    flap("apply", "-d", run, "--plan", one / "plan.yaml", "--out", one / "pruned", "--compensate", "none")
    checkpoint, family = open_checkpoint(one / "pruned"), open_checkpoint(str(dense)).family
    biased = any(f"{family.output(1, module)}.bias" in open_checkpoint(str(dense)).tensors for module in MODULES)
    assert checkpoint.shape.num_layers == (3 if biased or family.norms_stream else 2)
    expected = masked_dense(dense, one, False, run / "stats.safetensors")
    torch.testing.assert_close(logits(load_pruned(one / "pruned")), logits(expected), **CLOSE)


def test_all_load_without_flapcli(tmp_path):
    """Saved, and loaded again, by a process that can't import flapcli; the runs are those of the tests before."""
    assert RUNS, "needs the tests before it"
    expected = {name: logits(load_pruned(run / "pruned")) for name, run in RUNS.items()}
    code = f"""
for name, folder in { ({name: str(run / "pruned") for name, run in RUNS.items()})!r}.items():
    model = load(folder)
    again = {str(tmp_path)!r} + "/" + name
    model.save_pretrained(again)
    for loaded in (model, load(again)):
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m: name + m)
"""
    without_flapcli(code, expected, tmp_path)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-rw"])
def test_slopes_of_kept_heads_in_eager_attention(name, flap, text_file, tmp_path):
    """ALiBi, padded and not, where attention is spelled out; the contract's other tests run sdpa where there is one."""
    dense, run = make_family(tmp_path / "dense", name), tmp_path / "run"
    flap("calibrate", dense, "-d", run, "--dataset", text_file, *SMALL)
    flap("plan", "-d", run, "--ratio", "0.4")
    edit_keep(run, (0, "attention"), keep="1,4-5")
    edit_keep(run, (2, "attention"), keep="3")
    flap("apply", "-d", run)
    eager = {"attn_implementation": "eager"}
    sliced, expected = load_pruned(run / "pruned", **eager), masked_dense(dense, run, **eager)
    kept = next(m["kept_heads"] for m in sliced.config.flap["modules"] if m["kind"] == "attention")
    assert (kept[0], kept[2]) == ([1, 4, 5], [3])
    torch.testing.assert_close(logits(sliced), logits(expected), **CLOSE)
    torch.testing.assert_close(padded(sliced), padded(expected), **CLOSE)
    torch.testing.assert_close(step_by_step(sliced), logits(sliced)[:, 4:], **CLOSE)
