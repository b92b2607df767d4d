"""Mixture of Experts: what is measured of each expert, neurons and whole experts, and files as their source's."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.edits import edit_keep
from support.families import make_family
from support.models import load_dense
from support.pruned import CLOSE, load_pruned, logits, masked_dense
from transformers import AutoModelForCausalLM

from flapcli.artifacts.few_tokens import FEW
from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint
from flapcli.texts.windows import windows_of_stats

SMALL = ["--nsamples", "8", "--seqlen", "16", "--dtype", "float32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, flap, text_file):
    """A mixtral whose router never chooses the last expert: of a, -a, b, -b and 0 two are always above 0."""
    folder = tmp_path_factory.mktemp("experts")
    dense, run = make_family(folder / "dense", "mixtral-silent"), folder / "run"
    weights = load_file(dense / "model.safetensors")
    for name, gate in weights.items():
        if name.endswith(".gate.weight"):
            weights[name] = torch.stack([gate[0], -gate[0], gate[1], -gate[1], torch.zeros_like(gate[0])])
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    found = flap("calibrate", dense, "-d", run, "--dataset", text_file, *SMALL, "--gram", "--fisher")
    return dense, run, " ".join(found.stderr.split())


def test_an_experts_statistics_are_of_the_tokens_that_come_to_it(made):
    dense, run, _ = made
    model, stats = load_dense(dense), load_stats(run / "stats.safetensors")
    seen = []
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    windows = windows_of_stats(stats.header, run / "stats.safetensors", open_checkpoint(str(dense)))
    with torch.no_grad():
        model(torch.from_numpy(windows))
    [(states, index, weights)] = seen
    found, size = stats.modules[1, "experts"], experts.down_proj.shape[2]
    for expert in range(4):
        tokens, place = torch.where(index == expert)
        gate, up = (states[tokens] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        x = torch.nn.functional.silu(gate) * up
        share = weights[tokens, place, None]
        own = slice(expert * size, (expert + 1) * size)
        assert found.tokens[expert] == len(tokens)
        saliency = ((x @ experts.down_proj[expert].T).norm(dim=1) * share[:, 0]).mean()
        assert found.saliency[expert] == pytest.approx(float(saliency.detach()), rel=1e-4)
        for name, value in (("mean", (share * x).mean(0)), ("square_mean", (share * x).square().mean(0))):
            torch.testing.assert_close(torch.from_numpy(getattr(found, name)[own]), value, rtol=1e-4, atol=1e-6)
        gram = (share * x).T @ (share * x) / len(tokens)
        torch.testing.assert_close(torch.from_numpy(stats.gram(1, "experts")[expert]), gram, rtol=1e-3, atol=1e-5)


def test_a_silent_expert_is_said_and_not_pruned_for_its_silence(made, flap):
    dense, run, said = made
    stats = load_stats(run / "stats.safetensors")
    assert all(stats.modules[i, "experts"].tokens[4] == 0 for i in range(3))
    assert f"saw fewer than {FEW} tokens" in said
    flap("plan", "-d", run, "--method", "experts", "--ratio", "0.1", "--out", run / "whole.yaml")
    size = stats.model.layers[0].expert_size
    for layer in range(3):
        stay = set(load_plan(run / "whole.yaml").kept(layer, "experts") // size)
        assert len(stay) == 4 and 4 in stay
    flap("plan", "-d", run, "--ratio", "0.4")
    flap("apply", "-d", run, "--compensate", "lstsq", "--force")
    plan, kept = load_plan(run / "plan.yaml"), open_checkpoint(str(run / "pruned"))
    name = "model.layers.1.mlp.experts.down_proj"
    units = plan.kept(1, "experts")
    own = torch.from_numpy(units[units >= 4 * size] - 4 * size)
    assert 0 < len(own) < size
    torch.testing.assert_close(kept.read(name)[4], open_checkpoint(str(dense)).read(name)[4][:, own])


def test_least_squares_is_done_expert_by_expert(made, flap):
    """On what an expert was calibrated on the fitted columns lose less than the bare ones, and no bias is added."""
    dense, run, _ = made
    flap("plan", "-d", run, "--ratio", "0.4", "--out", run / "fit.yaml")
    stats, plan, errors = load_stats(run / "stats.safetensors"), load_plan(run / "fit.yaml"), {}
    name, size = "model.layers.2.mlp.experts.down_proj", stats.model.layers[2].expert_size
    whole = open_checkpoint(str(dense)).read(name)
    for how in ("none", "lstsq"):
        flap("apply", "-d", run, "--plan", run / "fit.yaml", "--compensate", how, "--out", run / how)
        kept = open_checkpoint(str(run / how))
        assert not [tensor for tensor in kept.tensors if "experts" in tensor and "bias" in tensor]
        for expert in range(4):
            units = plan.kept(2, "experts")
            own = torch.from_numpy(units[units // size == expert] - expert * size)
            change = -whole[expert]
            change[:, own] += kept.read(name)[expert]
            gram = torch.from_numpy(stats.gram(2, "experts")[expert])
            errors[how, expert] = float((change @ gram * change).sum())
    assert all(errors["lstsq", expert] < 0.9 * errors["none", expert] for expert in range(4))


@pytest.mark.parametrize(
    "name",
    ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v2-experts", "llama4_text"],
)
def test_whole_experts_leave_a_stock_folder(name, flap, text_file, tmp_path):
    """Files hold experts one by one as the source's do, and the router chooses no more than there are."""
    dense = make_family(tmp_path / "dense", name)
    flap("calibrate", dense, "-d", tmp_path, "--dataset", text_file, *SMALL)
    flap("plan", "-d", tmp_path, "--ratio", "0")
    size = load_stats(tmp_path / "stats.safetensors").model.layers[2].expert_size
    for layer, part in enumerate(load_plan(tmp_path / "plan.yaml").layers):
        if part.experts and part.experts.of:
            edit_keep(tmp_path, (layer, "experts"), keep=f"{size}-{2 * size - 1}")
    flap("apply", "-d", tmp_path, "--compensate", "none")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert "auto_map" not in config and config["num_experts_per_tok"] == 1
    files, theirs = (set(open_checkpoint(str(folder)).in_files) for folder in (tmp_path / "pruned", dense))
    assert files <= theirs and set(re.findall(r"\.experts\.(\d+)\.", " ".join(files))) <= {"0"}
    stock, told = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    torch.testing.assert_close(logits(stock.eval()), logits(masked_dense(dense, tmp_path, False)), **CLOSE)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4_text"])
def test_losses_by_fisher_information_and_by_layers(name, flap, text_file, tmp_path):
    """Streamed ones are those in memory, and plan and slice by them."""
    dense = make_family(tmp_path / "dense", name)
    for mode in ("--no-stream", "--stream"):
        out = tmp_path / f"{mode}.safetensors"
        flap("calibrate", dense, "--out", out, "--dataset", text_file, *SMALL, "--gram", "--fisher", mode)
    one, other = (load_stats(tmp_path / f"{mode}.safetensors") for mode in ("--no-stream", "--stream"))
    for key, values in one.fisher.items():
        torch.testing.assert_close(*(torch.from_numpy(v) for v in (values, other.fisher[key])), rtol=1e-3, atol=1e-9)
    flap(
        "plan", "-d", tmp_path, "--stats", tmp_path / "--stream.safetensors", "--metric", "FISHER-OBS", "--ratio", "0.3"
    )
    flap("apply", "-d", tmp_path, "--stats", tmp_path / "--stream.safetensors", "--model", dense)
    expected = masked_dense(dense, tmp_path, stats=tmp_path / "--stream.safetensors")
    torch.testing.assert_close(logits(load_pruned(tmp_path / "pruned")), logits(expected), **CLOSE)


def test_what_experts_do_not_allow_is_refused(made, flap):
    _, run, _ = made
    size = load_stats(run / "stats.safetensors").model.layers[0].expert_size
    flap("plan", "-d", run, "--structure", "UL-MM", "--remove-heads", "3", "--out", run / "mm.yaml", code=2)
    flap("plan", "-d", run, "--method", "experts", "--ratio", "0.95", "--out", run / "mm.yaml", code=2)
    one = run / "edited"
    flap("plan", "-d", run, "--ratio", "0", "--out", one / "plan.yaml")
    edit_keep(one, (1, "experts"), keep=f"0-{size},{3 * size}-{3 * size + 9}")
    told = flap("apply", "-d", run, "--plan", one / "plan.yaml", code=1).stderr
    assert f"layer 1, experts: they keep {size}, 1, 0, 10, 0 neurons" in " ".join(told.split())
    edit_keep(one, (1, "experts"), keep=f"0-{size - 1}")
    told = flap("apply", "-d", run, "--plan", one / "plan.yaml", "--mask-only", code=1).stderr
    assert "the plan drops experts of layer 1" in " ".join(told.split())
    told = flap("apply", "-d", run, "--plan", one / "plan.yaml", "--compensate", "lstsq", "--sequential", code=1).stderr
    assert "--sequential fits no experts" in told
