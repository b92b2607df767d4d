"""What other people's methods share in quality.py: pip puts a package aside, and how much a layer loses."""

import subprocess
import sys
from pathlib import Path

import torch


def put_aside(package: str, module: str, folder: Path, method: str) -> bool:
    """Whether `folder`, which then is on the path, holds the module; pip puts its package there, without what it asks
    for. A line says of which method that leaves out.
    """
    if not (folder / module).exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), package]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{method} is left out: pip can't install {package}: {done.stderr.strip().splitlines()[-1:]}")
            return False
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return True


def counts(model: torch.nn.Module, ratio: float) -> tuple[int, int, float]:
    """KV groups and neurons that every layer loses, the groups as near the ratio as they can, and what both come to."""
    layer, config = model.model.layers[0], model.config
    attention, mlp = (
        sum(p.numel() for p in module.parameters() if p.ndim > 1) for module in (layer.self_attn, layer.mlp)
    )
    group, neuron, whole = attention / config.num_key_value_heads, mlp / config.intermediate_size, attention + mlp
    groups = min(round(ratio * config.num_key_value_heads), config.num_key_value_heads - 1)
    neurons = round((ratio * whole - groups * group) / neuron)
    return groups, neurons, (groups * group + neurons * neuron) / whole
