"""Every command on a device without float64 finds what the CPU finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flapcli.artifacts.stats import load_stats
from flapcli.execution.device import Runtime, pick_dtype
from flapcli.execution.settings import Execution


def commands(model: Path, text: Path, out: Path) -> list[str]:
    """All that choose a device, into folders below `out`."""
    taken = f"--dataset {text} --nsamples 6 --seqlen 16 --dtype float32"
    perplexity = f"--perplexity {text} --seqlen 16"
    return [
        f"run {model} -d {out}/run {taken} {perplexity} --preset best",
        f"calibrate {model} -d {out}/stream {taken} --gram --fisher --stream",
        f"eval {out}/run/pruned --out {out}/eval.json {perplexity} --stream",
        f"generate fox --checkpoint {out}/run/pruned --max-new-tokens 4",
        f"sweep {model} -d {out}/sweep --ratios 0.2 {taken} {perplexity}",
        f"export gguf {out}/run/pruned --out {out}/model.gguf",
        f"report -d {out}/run",
    ]


def test_all_commands(tiny, text_file, tmp_path, flap):
    model = tiny("llama-gqa")
    for line in commands(model, text_file, tmp_path / "cpu"):
        flap(*line.split())
    done = subprocess.run(
        [sys.executable, "-m", "support.small_device"],
        input="\n".join(f"{line} --debug" for line in commands(model, text_file, tmp_path / "small")),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("run", "stream"):
        ours, theirs = (load_stats(tmp_path / device / name / "stats.safetensors") for device in ("small", "cpu"))
        for key, stats in theirs.modules.items():
            np.testing.assert_allclose(ours.modules[key].variance, stats.variance, rtol=1e-4)
            np.testing.assert_allclose(ours.gram(*key), theirs.gram(*key), rtol=1e-4, atol=1e-5)
    ours, theirs = (json.loads((tmp_path / device / "run" / "eval.json").read_text()) for device in ("small", "cpu"))
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.01)
    assert ours["baseline"]["perplexity"] == pytest.approx(theirs["baseline"]["perplexity"], rel=1e-4)


def test_one_place_knows_what_a_device_does(monkeypatch):
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, c=capability: c)
        assert pick_dtype("auto", torch.device("cuda")) == dtype  # a T4 and a V100 only emulate bfloat16
    torch.set_float32_matmul_precision("high")  # as an image may have it
    Runtime.of(Execution(device="cpu"), "float32")
    assert torch.get_float32_matmul_precision() == "highest"
