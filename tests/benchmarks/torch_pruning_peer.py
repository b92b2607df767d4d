"""Torch-Pruning (Fang et al. 2023, DepGraph, arXiv 2301.12900), by its own package, for quality.py.

Its dependency graph says what goes with what, and its Taylor importance what goes first: |weight x gradient| of the
cross entropy on the calibration's windows, over all weights of a unit. Nothing is refitted. As in the package's
examples/LLMs/prune_llm.py each layer is ranked alone and head_dim stays. Unlike there the residual width stays, as in
all rows, and query heads go with the KV head that they share, as in OSSCAR's.
"""

import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peers import counts, put_aside
from safetensors.torch import load_file, save_file

from flapcli.checkpoints import open_checkpoint
from flapcli.execution.device import Runtime
from flapcli.execution.loading import layers_of, load_model
from flapcli.execution.settings import Execution
from flapcli.storage.atomic import atomic_file
from flapcli.texts.corpus import Windows, calibration_windows

PACKAGE = "torch-pruning==1.6.1"
BATCH = 4  # windows at once


def torch_pruning(name: str, nsamples: int, ratio: float, folder: Path) -> tuple[Path, float] | None:
    """The pruned model's folder, and the ratio achieved; None where the package can't be had."""
    if not put_aside(PACKAGE, "torch_pruning", folder / "package", "torch-pruning"):
        return None
    tp = import_module("torch_pruning")
    checkpoint, runtime = open_checkpoint(name), Runtime.of(Execution(), "float32")
    tokenizer = checkpoint.load_tokenizer()
    windows = calibration_windows("pydoc", tokenizer, nsamples, 128, 0)
    model = load_model(checkpoint, runtime.dtype, runtime.device)
    model.set_attn_implementation("eager")  # which repeats K and V in sight of the graph
    groups, neurons, achieved = counts(model, ratio)
    graph = traced(tp, model, windows)
    gradients(model, windows, folder / f"gradients-{checkpoint.fingerprint[:12]}-{nsamples}.safetensors")
    config = model.config
    for layer in layers_of(model, checkpoint):
        prune(tp, graph, layer.self_attn.o_proj, config.num_key_value_heads, groups)
        prune(tp, graph, layer.mlp.down_proj, config.intermediate_size, neurons)
    config.num_attention_heads -= groups * (config.num_attention_heads // config.num_key_value_heads)
    config.num_key_value_heads -= groups
    config.intermediate_size -= neurons
    pruned = folder / f"{checkpoint.fingerprint[:12]}-{ratio}"
    model.to(torch.bfloat16).save_pretrained(pruned)
    tokenizer.save_pretrained(pruned)
    return pruned, achieved


def traced(tp: ModuleType, model: torch.nn.Module, windows: Windows) -> Any:
    """The package's dependency graph, from a few tokens. It warns of norms' weights, which stay as they are."""
    tokens = torch.from_numpy(windows[:1, :8]).to(model.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tp.DependencyGraph().build_dependency(model, example_inputs={"input_ids": tokens, "use_cache": False})


def gradients(model: torch.nn.Module, windows: Windows, file: Path) -> None:
    """Into every weight of the layers its gradient of the cross entropy, the mean over all windows.

    Products are in bfloat16 as in all rows, sums over windows in float32. All ratios read the same, so `file` keeps it.
    """
    weights = {name: weight for name, weight in model.model.layers.named_parameters() if weight.ndim > 1}
    if not file.exists():
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for part in torch.from_numpy(windows).to(model.device).split(BATCH):
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(input_ids=part, labels=part, use_cache=False).loss
            (loss * len(part) / len(windows)).backward()
        with atomic_file(file) as scratch:
            save_file({name: weight.grad for name, weight in weights.items()}, scratch)
    for name, gradient in load_file(file, str(model.device)).items():
        weights[name].grad = gradient


def prune(tp: ModuleType, graph: Any, reader: torch.nn.Linear, units: int, gone: int) -> None:
    """Take the least important `gone` of so many units that `reader` reads out of the model, with all that makes them.

    Channels are scored, and averaged over a unit, as by the package's own pruner; of mha's heads and of neurons the two
    choose the same. But that never takes a KV head which several query heads read, though its graph says which they
    read. Such a head's own weights have no part in the score.
    """
    if not gone:
        return
    width = reader.in_features // units
    whole = graph.get_pruning_group(reader, tp.prune_linear_in_channels, list(range(reader.in_features)))
    importance = tp.importance.TaylorImportance()(whole).view(units, width).mean(1)
    lost = importance.topk(gone, largest=False).indices.sort().values
    channels = (lost[:, None] * width + torch.arange(width, device=lost.device)).flatten().tolist()
    group = graph.get_pruning_group(reader, tp.prune_linear_in_channels, channels)
    for i, (dependency, indices) in enumerate(group):
        # A KV head comes up once for each query head that reads it, and the widths noted would shrink as often.
        group[i] = type(group[i])(dependency, sorted(set(indices)))
    group.prune()
