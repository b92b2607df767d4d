"""Pruned folders loaded again, and what their dense model computes when it is masked in their place."""

import json
import os
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from flapcli.architecture import modeling_flap as modeling
from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint

IDS = torch.tensor([[5, 17, 200, 31, 7, 99, 250, 3, 64, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def load_pruned(folder, **how):
    """By flap's own class, or by transformers' where the folder is a stock checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    name = config["architectures"][0]
    loader = AutoModelForImageTextToText if name.endswith("ForConditionalGeneration") else AutoModelForCausalLM
    if "auto_map" in config:
        loader = getattr(modeling, name)
    return loader.from_pretrained(folder, dtype=torch.float32, **how).eval()


def masked_dense(dense_folder, run, bias=True, stats=None, **how):
    """A model with the columns of pruned channels zeroed and the paper's bias, which nothing of flap computes."""
    model, plan = load_pruned(dense_folder, **how), load_plan(run / "plan.yaml")
    stats, checkpoint = load_stats(stats or run / "stats.safetensors"), open_checkpoint(str(dense_folder))
    family, wrapper = checkpoint.family, checkpoint.wrapper
    for i in range(len(plan.layers)):
        for module in plan.modules:
            if not (units := plan.layers[i].module(module).of):
                continue
            if module == "experts":
                mask_experts(model.get_submodule(family.layer.format(i=i)), family.experts, plan.kept(i, module))
                continue
            path = family.output(i, module)
            path = path.replace("model.layers", wrapper.layers) if wrapper else path
            projection, mean = model.get_submodule(path), stats.modules[i, module].mean
            gone = torch.ones(units, len(mean) // units, dtype=torch.bool)
            gone[plan.kept(i, module)] = False
            columns = projection.weight.detach().T if family.transposed else projection.weight.detach()
            owed = columns[:, gone.flatten()] @ torch.from_numpy(mean)[gone.flatten()] * bias
            columns[:, gone.flatten()] = 0
            old = 0 if projection.bias is None else projection.bias.detach()
            projection.bias = torch.nn.Parameter(old + owed)
    return model


def mask_experts(layer, description, kept):
    """Zeroes in a layer what pruned neurons of experts put out, and lets the router see the experts that stay alone."""
    experts = layer.get_submodule(description.output.rpartition(".")[0])
    down = experts.down_proj.detach()
    count, axis = len(down), 1 if description.transposed else 2
    gone = torch.ones(count, down.shape[axis], dtype=torch.bool)
    gone.view(-1)[torch.from_numpy(kept)] = False
    for expert in range(count):
        down[expert].index_fill_(axis - 1, gone[expert].nonzero().flatten(), 0)
    stay = (~gone.all(1)).nonzero().flatten()
    if not len(stay) and hasattr(experts, "down_proj_bias"):
        experts.down_proj_bias.detach().zero_()
    if 0 < len(stay) < count:
        router = layer.get_submodule(next(iter(description.unit_tensors)).rpartition(".")[0])
        for owner, _, name in (name.rpartition(".") for name in description.unit_tensors):
            if (tensor := getattr(layer.get_submodule(owner), name, None)) is not None:
                tensor.data = tensor.data[stay]
        router.num_experts, router.top_k = len(stay), min(router.top_k, len(stay))

        def renumbered(_module, _inputs, found):
            if len(found) == 3:
                return *found[:2], stay[found[2]]
            return found[0].new_zeros(len(found[0]), count).index_copy(1, stay, found[0]), found[1]

        router.register_forward_hook(renumbered)


def step_by_step(model, ids=IDS):
    """Logits of the last tokens, each from the cache of those before."""
    with torch.no_grad():
        found = model(ids[:, :5], use_cache=True)
        rows = [found.logits[:, -1]]
        for place in range(5, ids.shape[1]):
            found = model(ids[:, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
            rows.append(found.logits[:, -1])
    return torch.stack(rows, 1)


def without_flapcli(code, expected, tmp_path):
    """Run code in a process that can't import flapcli, after `ids`, `expected` (saved for it) and `load`."""
    torch.save(expected, tmp_path / "expected.pt")
    before = f"""
import sys
sys.modules["flapcli"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor({IDS.tolist()})
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
"""
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin",
           "HOME": str(tmp_path), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def load_served(folder):
    """As a user's transformers loads it, by the code in the folder."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def greedy(model, prompts, count):
    """The `count` likeliest tokens after every prompt, all computed anew for each; what stands behind is not seen."""
    rows = [list(ids) for ids in prompts]
    for _ in range(count):
        width = max(map(len, rows))
        found = logits(model, torch.tensor([row + [0] * (width - len(row)) for row in rows]))
        for row, scores in zip(rows, found, strict=True):
            row.append(int(scores[len(row) - 1].argmax()))
    return [row[len(ids) :] for row, ids in zip(rows, prompts, strict=True)]
