"""One calibration by several real gloo processes: the same statistics, one writer, and no hang when one dies."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flapcli.stats import load_stats

RANK = Path(__file__).with_name("rank.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(size, *arguments, present=None, **environment):
    """Exit code and stderr of every rank of `flap ARGUMENTS`, started as by torchrun but by hand."""
    port = free_port()
    started = []
    for rank in present or range(size):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}  # fmt: skip
        env = os.environ | ENVIRONMENT | {key: str(value) for key, value in told.items()}
        command = [sys.executable, RANK, *(str(a) for a in arguments)]
        started.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return [(process.returncode, out, err) for process in started for out, err in [process.communicate(timeout=120)]]


def calibrate(model, text_file, run, nsamples=7):
    return ["calibrate", model, "-d", run, "--dataset", text_file, "--nsamples", nsamples, "--seqlen", 24,
            "--batch-size", 2, "--dtype", "float32", "--gram"]  # fmt: skip


def assert_close(ours, theirs):
    for key, stats in theirs.modules.items():
        found = ours.modules[key]
        for name in ("variance", "square_mean", "weight_square_sum", "weight_abs_mean"):
            np.testing.assert_allclose(getattr(found, name), getattr(stats, name), rtol=1e-5)
        np.testing.assert_allclose(found.mean, stats.mean, rtol=1e-5, atol=1e-5 * np.sqrt(stats.variance).max())
        gram = theirs.gram(*key)
        np.testing.assert_allclose(ours.gram(*key), gram, rtol=1e-4, atol=1e-5 * gram.max())


@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
@pytest.mark.parametrize("size,nsamples", [(2, 7), (3, 7), (3, 2)])
def test_ranks_give_the_statistics_of_one_process(mode, size, nsamples, tiny, text_file, flap, tmp_path):
    """Uneven shares, and more ranks than windows; twice the same bits."""
    model = tiny("mistral-window")
    flap(*calibrate(model, text_file, tmp_path / "alone", nsamples), mode)
    for run in ("one", "two"):
        done = ranks(size, *calibrate(model, text_file, tmp_path / run, nsamples), mode)
        assert [code for code, _, _ in done] == [0] * size, done
        assert "written" in done[0][2]
        assert all(not out and "written" not in err for _, out, err in done[1:])
        assert [path.name for path in (tmp_path / run).iterdir()] == ["stats.safetensors"]
    alone, one = (load_stats(tmp_path / run / "stats.safetensors") for run in ("alone", "one"))
    assert one.header == alone.header
    assert_close(one, alone)
    assert (tmp_path / "one" / "stats.safetensors").read_bytes() == (tmp_path / "two" / "stats.safetensors").read_bytes()


def test_torchrun(tiny, text_file, flap, tmp_path):
    arguments = [str(a) for a in calibrate(tiny("llama-gqa"), text_file, tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
               "-m", "flapcli", *arguments]  # fmt: skip
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stats.safetensors: written") == 1
    flap(*calibrate(tiny("llama-gqa"), text_file, tmp_path / "alone"))
    assert_close(*(load_stats(tmp_path / run / "stats.safetensors") for run in ("run", "alone")))
    again = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("up to date") == 1


@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
@pytest.mark.parametrize("dying", [0, 1])
def test_a_dead_rank_is_named_and_the_next_run_goes_on(mode, dying, tiny, text_file, flap, tmp_path, monkeypatch):
    model = tiny("llama-gqa")
    arguments = [*calibrate(model, text_file, tmp_path / "run", 12), mode, "--rank-timeout", 8]
    began = time.monotonic()
    done = ranks(3, *arguments, DIE_RANK=dying, DIE_AFTER=3 if mode == "--stream" else 1)
    assert time.monotonic() - began < 60
    assert done[dying][0] == -9
    for rank in {0, 1, 2} - {dying}:
        code, _, err = done[rank]
        assert code == 1, done
        [line] = [line for line in err.splitlines() if line.startswith("error:")]
        assert re.search(rf"rank {dying} .*(died|gave no sign of life)", line), line
    assert not (tmp_path / "run" / "stats.safetensors").exists()
    done = ranks(3, *arguments)
    assert [code for code, _, _ in done] == [0, 0, 0], done
    assert ("going on with layer 1" in done[0][2]) == (mode == "--stream")
    undisturbed = ranks(3, *calibrate(model, text_file, tmp_path / "other", 12), mode)
    assert [code for code, _, _ in undisturbed] == [0, 0, 0], undisturbed
    paths = [tmp_path / run / "stats.safetensors" for run in ("run", "other")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_failing_ranks_reason_is_told(tiny, text_file, tmp_path):
    arguments = [*calibrate(tiny("llama-gqa"), text_file, tmp_path / "run"), "--stream"]
    done = ranks(2, *arguments, DIE_RANK=1, DIE_AFTER=1, FAIL=1)
    assert [code for code, _, _ in done] == [1, 1]
    assert re.search(r"rank 1 .* failed: this rank's own trouble", done[0][2]), done
    assert "error: this rank's own trouble" in done[1][2]


@pytest.mark.parametrize("present", [[0], [1]])
def test_a_rank_that_never_comes_is_named(present, tiny, text_file, tmp_path):
    arguments = [*calibrate(tiny("llama-gqa"), text_file, tmp_path / "run"), "--rank-timeout", 5]
    [(code, _, err)] = ranks(2, *arguments, present=present)
    assert code == 1
    [line] = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"rank {1 - present[0]}" in line
    assert "did not come within 5 s" in line


def test_only_calibrate_runs_in_several_processes(flap, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "only calibrate runs under torchrun" in flap("run", "demo", code=2).stderr
