"""Checkpoints in .bin files, and float8 ones, which are refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import FEW, make_tiny, to_bin

from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint
from flapcli.errors import FlapError


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_reads_as_safetensors(kind, shards, tmp_path):
    dense = open_checkpoint(str(make_tiny(tmp_path / "dense", kind)))
    other = open_checkpoint(str(to_bin(make_tiny(tmp_path / "bin", kind), shards)))
    assert other.tensors == dense.tensors
    assert other.nbytes == dense.nbytes
    assert other.stored_as == dense.stored_as
    for name in dense.tensors:
        assert torch.equal(other.read(name), dense.read(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bin_goes_through_every_stage(dtype, tmp_path, prune):
    dense = make_tiny(tmp_path / "dense", "llama-gqa", dtype=dtype)
    run = prune(to_bin(shutil.copytree(dense, tmp_path / "bin"), 2), tmp_path / "run")
    same = prune(dense, tmp_path / "same")
    ours, theirs = (load_stats(r / "stats.safetensors") for r in (run, same))
    for key, stats in theirs.modules.items():
        assert all((getattr(ours.modules[key], f) == value).all() for f, value in vars(stats).items())
    pruned, expected = (open_checkpoint(str(r / "pruned")) for r in (run, same))
    assert pruned.tensors == expected.tensors
    assert all(torch.equal(pruned.read(n), expected.read(n)) for n in expected.tensors)


def test_fingerprint_follows_the_weights(tmp_path):
    one = to_bin(make_tiny(tmp_path / "one", "llama-gqa"))
    same = to_bin(make_tiny(tmp_path / "same", "llama-gqa"))
    other = to_bin(make_tiny(tmp_path / "other", "llama-gqa", seed=1))
    prints = [open_checkpoint(str(folder)).fingerprint for folder in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_broken_bin_files_are_refused_in_one_line(tmp_path):
    folder = to_bin(make_tiny(tmp_path / "model", "llama-gqa"))
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FlapError, match=r"pytorch_model.bin is truncated, corrupt or of the format before"):
        open_checkpoint(str(folder)).shape  # noqa: B018
    torch.save({"model.norm.weight": torch.zeros(48), "more": TrojanHorse()}, path)
    with pytest.raises(FlapError, match="holds more than tensors"):
        open_checkpoint(str(folder)).shape  # noqa: B018


class TrojanHorse:
    def __reduce__(self):
        return print, ("code ran",)


def test_float8_is_refused(tmp_path, flap):
    folder = make_tiny(tmp_path / "model", "llama-gqa")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = flap("calibrate", folder, "-d", tmp_path / "run", "--dataset", "pydoc", code=1)
    assert f"{name} is float8 (F8_E4M3), which flap does not prune" in result.stderr
