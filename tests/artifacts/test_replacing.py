"""What is broken is made again, what is linked stays linked, what is not flap's stays there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_tiny


@pytest.fixture
def run(tiny, prune, tmp_path):
    return prune(tiny("llama-gqa"), tmp_path / "run")


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.mark.parametrize("harm", ["delete", "truncate", "empty", "index"])
def test_broken_weights_are_not_up_to_date(harm, run, flap):
    before = weights(run / "pruned")
    assert "up to date" in flap("apply", "-d", run).stderr
    [shard] = (run / "pruned").glob("model-*.safetensors")
    if harm == "delete":
        shard.unlink()
    elif harm == "index":
        (run / "pruned" / "model.safetensors.index.json").write_text("{}")
    else:
        shard.write_bytes(shard.read_bytes()[:-1] if harm == "truncate" else b"")
    assert "written" in flap("apply", "-d", run).stderr
    assert weights(run / "pruned") == before
    assert "up to date" in flap("apply", "-d", run).stderr


@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_links_are_followed(way, tiny, flap, text_file, tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    disk.mkdir()
    (disk / "s").write_bytes(b"")
    for name in ("stats.safetensors", "plan.yaml"):
        (run / name).symlink_to(disk / name)
    options = ("--dataset", text_file, "--nsamples", 8, "--seqlen", 16, way)
    flap("calibrate", tiny("llama-gqa"), "-d", run, *options)
    flap("plan", "-d", run)
    assert all((run / name).is_symlink() for name in ("stats.safetensors", "plan.yaml"))
    assert (disk / "stats.safetensors").stat().st_size > 1000
    assert "format: flap-plan/1" in (disk / "plan.yaml").read_text()


def test_pages_and_pictures_replace_only_their_like(run, flap):
    plan = (run / "plan.yaml").read_bytes()
    for arguments in (
        ["report", "-d", run, "-o", run / "plan.yaml"],
        ["report", "-d", run, "-o", run / "stats.safetensors"],
    ):
        assert "is no page of flap's: move it away" in flap(*arguments, code=1).stderr
    (run / "notes.png").write_text("my notes")
    assert "is no .png picture" in flap("show", run, "--plot", run / "notes.png", code=1).stderr
    assert (run / "notes.png").read_text() == "my notes"
    assert (run / "plan.yaml").read_bytes() == plan
    for name in ("kept.png", "kept.svg"):
        for _ in range(2):
            flap("show", run, "--plot", run / name)
    for _ in range(2):
        flap("report", "-d", run)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_that_the_type_can_not_hold_are_refused(dtype, flap, prune, tmp_path):
    folder = make_tiny(tmp_path / "model", "llama-gqa")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.down_proj.weight"][0] = 1e5
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    run = prune(folder, tmp_path / "run")
    before = weights(run / "pruned")
    code = int(dtype == "float16")
    said = flap("apply", "-d", run, "--dtype", dtype, code=code).stderr
    if code:
        assert "model.layers.1.mlp.down_proj.weight has values beyond float16: write it in another type" in said
        assert weights(run / "pruned") == before
        return
    [shard] = (run / "pruned").glob("model-*.safetensors")
    assert all(torch.isfinite(value).all() for value in load_file(shard).values())
    assert json.loads((run / "pruned" / "config.json").read_text())["dtype"] == "bfloat16"
