"""Pruned folders loaded again, and what their dense model computes when it is masked in their place."""

import json

import torch
from support.models import load_dense
from transformers import AutoModelForCausalLM

from flapcli.architecture import modeling_flap as modeling
from flapcli.architecture.shape import MODULES
from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_stats

IDS = torch.tensor([[5, 17, 200, 31, 7, 99, 250, 3, 64, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def load_pruned(folder):
    """By flap's own class, or by transformers' where the folder is a stock checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    stock = "auto_map" not in config
    loader = AutoModelForCausalLM if stock else getattr(modeling, config["architectures"][0])
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


def masked_dense(dense_folder, run, bias=True):
    """The dense model with the columns of pruned channels zeroed and the paper's bias, by transformers alone."""
    model, plan, stats = load_dense(dense_folder), load_plan(run / "plan.yaml"), load_stats(run / "stats.safetensors")
    for i, layer in enumerate(model.model.layers):
        for module in MODULES:
            projection = layer.self_attn.o_proj if module == "attention" else layer.mlp.down_proj
            per_unit = stats.model.channels_per_unit(module)
            gone = torch.ones(projection.in_features, dtype=torch.bool)
            for unit in plan.kept(i, module):
                gone[unit * per_unit : (unit + 1) * per_unit] = False
            mean = torch.from_numpy(stats.modules[i, module].mean)
            with torch.no_grad():
                owed = projection.weight[:, gone] @ mean[gone] if bias else torch.zeros(projection.out_features)
                old = 0 if projection.bias is None else projection.bias
                projection.bias = torch.nn.Parameter(old + owed)
                projection.weight[:, gone] = 0
    return model
