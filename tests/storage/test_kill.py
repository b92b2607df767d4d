"""Killed with SIGKILL anywhere, or out of disk, a stage goes on or starts over; nothing that looks done is left."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.stages import STAGES
from transformers import LlamaConfig

from flapcli.storage.atomic import explain

TESTS = Path(__file__).parents[1]
MEMORY = "/dev/shm"  # where flushing to disk costs nothing


def run(module: str, *arguments: object) -> dict[str, dict]:
    """What a module of tests/support prints of each stage, by its name."""
    with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as folder:
        done = subprocess.run(
            [sys.executable, "-m", f"support.{module}", folder, *map(str, arguments)],
            capture_output=True, text=True, check=False, cwd=TESTS,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["stage"]: row for row in map(json.loads, lines)}


def test_killed_anywhere_every_stage_ends_as_if_it_had_not_been():
    """Once each here; tests/benchmarks/kills.py, which shows that they go on too, kills a thousand times."""
    found = run("kill", 1, 0)
    assert {name: row["kills"] for name, row in found.items()} == dict.fromkeys(STAGES, 1)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount a tmpfs")
def test_a_full_disk_is_named_and_nothing_half_done_is_left():
    found = run("full", 1)
    assert {name: row["points"] for name, row in found.items()} == dict.fromkeys(STAGES, 1)
    assert all(row["exit 1"] for row in found.values())


def test_a_full_disk_in_numpys_words(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is full")
    with pytest.raises(OSError) as told, open("/dev/full", "wb", buffering=0) as full:
        np.zeros(1 << 20).tofile(full)
    assert "no space left while writing" in str(explain(told.value, tmp_path))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of many small layers, so that there is much to be killed in."""
    from support import models

    sizes = models.SIZES | {"num_hidden_layers": 16}
    models.CONFIGS["deep"] = LlamaConfig(**sizes, **models.GQA)
    try:
        return models.make_tiny(tmp_path_factory.mktemp("deep"), "deep", shard="100KB", dtype=torch.bfloat16)
    finally:
        del models.CONFIGS["deep"]


def test_another_calibrations_checkpoint_is_not_gone_on_with(deep, text_file, tmp_path, flap, monkeypatch):
    """Left by a run of other settings: discarded. Left by the same: gone on with, unless --force."""
    from flapcli.calibration.streaming import ForwardPass

    def calibrate(*more, code=0):
        args = ("--dataset", text_file, "--nsamples", 8, "--seqlen", 16, "--stream")
        return flap("calibrate", deep, "-d", tmp_path, *args, *more, code=code)

    through = ForwardPass._layer

    def stop(self, layer, *args):
        if layer.index == 5:
            raise KeyboardInterrupt
        through(self, layer, *args)

    def interrupted(*more):
        monkeypatch.setattr(ForwardPass, "_layer", stop)
        assert "interrupted" in calibrate(*more, code=130).stderr
        monkeypatch.undo()

    interrupted()
    assert not (tmp_path / "stats.safetensors").exists()
    assert "going on" not in calibrate("--seed", 1).stderr
    (tmp_path / "stats.safetensors").unlink()
    interrupted()
    assert "going on with layer 5 of 16" in calibrate().stderr
    interrupted("--force")
    assert "going on" not in calibrate("--force").stderr
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]
