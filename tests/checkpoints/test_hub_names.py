"""Files as they lie on the hub: without the model's prefix, with buffers that no runtime reads, in .bin files."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.edits import even_plan
from support.families import make_family
from support.models import load_dense, to_bin
from support.pruned import CLOSE, load_pruned, logits

from flapcli.checkpoints import open_checkpoint

SMALL = ["--nsamples", "8", "--seqlen", "16", "--dtype", "float32"]
MASK = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
GPT = {"attn.bias": MASK, "attn.masked_bias": torch.tensor(-1e4)}
NEOX = {"attention.bias": MASK, "attention.masked_bias": torch.tensor(-1e9)}
NEOX["attention.rotary_emb.inv_freq"] = torch.ones(4)
# By name: a family of FAMILY_CONFIGS, what its names lose or are called, buffers in every layer, and a copied head.
HUB = {
    "gpt2": ("gpt2", (r"^transformer\.", ""), "h.{i}.", GPT, None),
    "gpt2-head": ("gpt2", (r"^$", ""), "transformer.h.{i}.", GPT, "transformer.wte.weight"),
    "bloom": ("bloom", (r"^transformer\.", ""), "h.{i}.", {}, None),
    "opt": ("opt", (r"^model\.", ""), "decoder.layers.{i}.", {}, "model.decoder.embed_tokens.weight"),
    "gpt_neox": ("gpt_neox", (r"^lm_head\.", "embed_out."), "gpt_neox.layers.{i}.", NEOX, None),
    "llama": ("llama", (r"^$", ""), "model.layers.{i}.", {"self_attn.rotary_emb.inv_freq": torch.ones(4)}, None),
}


@pytest.fixture(scope="module", params=HUB)
def both(request, tmp_path_factory, flap, text_file):
    """A folder as save_pretrained writes it, and the same model as on the hub, in a .bin file; each pruned."""
    family, (pattern, name), layer, buffers, head = HUB[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    native = make_family(folder / "native", family)
    tensors = load_file(native / "model.safetensors")
    made = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    made |= {layer.format(i=i) + key: tensor.clone() for i in range(3) for key, tensor in buffers.items()}
    made |= {"lm_head.weight": tensors[head].clone()} if head else {}
    assert set(made) != set(tensors)
    hub = folder / "hub"
    hub.mkdir()
    for path in native.iterdir():
        (hub / path.name).write_bytes(path.read_bytes())
    save_file(made, hub / "model.safetensors", {"format": "pt"})
    to_bin(hub, 2)
    for each, how in ((native, "--no-stream"), (hub, "--stream")):
        run = folder / f"run-{each.name}"
        flap("calibrate", each, "-d", run, "--dataset", text_file, *SMALL, how)
        flap("plan", "-d", run, "--ratio", "0.3")
        flap("apply", "-d", run)
    return native, hub


def test_they_are_the_same_model(both):
    native, hub = (open_checkpoint(str(folder)) for folder in both)
    assert hub.tensors == native.tensors
    assert hub.shape.parameters == native.shape.parameters
    assert all(torch.equal(hub.read(name), native.read(name)) for name in native.tensors)
    torch.testing.assert_close(logits(load_dense(both[1])), logits(load_dense(both[0])), rtol=1e-6, atol=1e-6)


def test_they_are_pruned_alike(both):
    pruned = [folder.parent / f"run-{folder.name}" / "pruned" for folder in both]
    torch.testing.assert_close(*(logits(load_pruned(folder)) for folder in pruned), **CLOSE)
    native, hub = (open_checkpoint(str(folder)) for folder in pruned)
    assert set(hub.in_files) == set(native.in_files)  # by the model's own names, and no buffers


def test_even_keeps_the_names_of_the_hub(both, flap, tmp_path):
    """As a stock folder, whose names transformers knows."""
    for folder in both:
        place = tmp_path / folder.name
        run = folder.parent / f"run-{folder.name}"
        even_plan(run, place, flap, whole=True)
        (place / "stats.safetensors").write_bytes((run / "stats.safetensors").read_bytes())
        flap("apply", "-d", place, "--compensate", "none")
    one, other = (tmp_path / folder.name / "pruned" for folder in both)
    torch.testing.assert_close(logits(load_pruned(one)), logits(load_pruned(other)), **CLOSE)
    named = open_checkpoint(str(other)).in_files
    if not (other / "modeling_flap.py").exists():
        assert set(named) <= set(open_checkpoint(str(both[1])).in_files)
