"""What flap takes for a model's tensors is what the loader takes: at ratio 0 the pruned folder computes the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import load_dense, to_bin
from support.pruned import CLOSE, load_pruned, logits


def tied_with_both(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def equal_but_untied(folder):
    tied_with_both(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def mixed_dtypes(folder):
    weights = load_file(folder / "model.safetensors")
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    changed = {name: value.to(kinds[i % 3]) for i, (name, value) in enumerate(weights.items())}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def extra_tensors(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama-tied", lambda folder: None), ("llama-tied", tied_with_both), ("llama-tied", equal_but_untied),
        ("llama-tied", to_bin), ("qwen2-tied", tied_with_both), ("llama-gqa", to_bin), ("llama-gqa", mixed_dtypes),
        ("llama-gqa", extra_tensors), ("llama-biases", mixed_dtypes),
    ],
)  # fmt: skip
def test_ratio_0_changes_nothing(kind, change, tiny, prune, tmp_path):
    folder = shutil.copytree(tiny(kind), tmp_path / "model")
    change(folder)
    run = prune(folder, tmp_path / "run", "--ratio 0")
    torch.testing.assert_close(logits(load_pruned(run / "pruned")), logits(load_dense(folder)), **CLOSE)
