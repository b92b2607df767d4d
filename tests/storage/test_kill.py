"""Killed with SIGKILL anywhere, calibrate goes on and apply starts over; nothing that looks done is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

KILLS = 22
SUPPORT = Path(__file__).parents[1] / "support"


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


def kill(folder: Path, arguments: list, artifact: str, setup: str = "", kills: int = KILLS) -> dict:
    """Runs kill.py on `flap ARGUMENTS --out ARTIFACT`; returns what it reports."""
    task = {"kills": kills, "seed": 0, "setup": setup}
    for name in ("expected", "result"):
        path = folder / name / artifact
        path.parent.mkdir(parents=True)
        task[name] = {"arguments": [str(a) for a in (*arguments, "--debug", "--out", path)], "path": str(path)}
    (folder / "task.json").write_text(json.dumps(task))
    done = subprocess.run(
        [sys.executable, SUPPORT / "kill.py", folder / "task.json"],
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    print(outcome)
    assert outcome["killed"] == kills
    return outcome


@pytest.mark.parametrize(
    "mode",
    [
        "--stream", "--stream --activation-memory 1KB", "--stream --gram", "--no-stream", "--no-stream --gram",
        "--stream --fisher --gram", "--no-stream --fisher",
    ],
)  # fmt: skip
def test_calibrate_goes_on(mode, deep, text_file, tmp_path):
    every_batch = "import flapcli.calibration.in_memory as c; c.SECONDS_BETWEEN = c.TIMES_ITS_COST = 0"
    arguments = ["calibrate", deep, "--dataset", text_file, "--nsamples", 96, "--seqlen", 32, "--batch-size", 4]
    kills = KILLS // 2 if "--fisher" in mode else KILLS  # a way back, too, which takes as long again
    outcome = kill(tmp_path, [*arguments, *mode.split()], "stats.safetensors", every_batch, kills)
    assert outcome["went_on"] > 3


def test_apply_starts_over(deep, prune, tmp_path):
    run = prune(deep, tmp_path / "run")
    kill(tmp_path, ["apply", "-d", run, "--max-shard-size", "60KB"], "pruned")


def test_another_calibrations_checkpoint_is_not_gone_on_with(deep, text_file, tmp_path, flap, monkeypatch):
    """Left by a run of other settings: discarded. Left by the same: gone on with, unless --force."""
    from flapcli.calibration.streaming import ForwardPass

    def calibrate(*more, code=0):
        args = ("--dataset", text_file, "--nsamples", 8, "--seqlen", 16, "--stream")
        return flap("calibrate", deep, "-d", tmp_path, *args, *more, code=code)

    layer = ForwardPass._layer

    def stop(self, index, *args):
        if index == 5:
            raise KeyboardInterrupt
        layer(self, index, *args)

    def interrupted(*more):
        monkeypatch.setattr(ForwardPass, "_layer", stop)
        assert "interrupted" in calibrate(*more, code=1).stderr
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
