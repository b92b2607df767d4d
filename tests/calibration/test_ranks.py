"""One stage by several real gloo processes: the same artifact, one writer, and no hang when one dies."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.measured import assert_close
from support.stages import contents
from support.torchrun import ENVIRONMENT, free_port, torchrun

from flapcli.artifacts.pruned_folder import load_pruned
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint
from flapcli.errors import FlapError
from flapcli.texts.calibration_text import refuse_unlike_ranks

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def ranks():
    """Runs `flap ARGUMENTS` in `size` processes; returns exit code, stdout and stderr of every one."""
    command = [sys.executable, SUPPORT / "forks.py"]
    server = subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def run(size, *arguments, present=None, dying=None, **trouble):
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        told = [
            shared | {"RANK": rank, "LOCAL_RANK": rank} | (trouble if rank == dying else {})
            for rank in present or range(size)
        ]
        job = {
            "arguments": [str(a) for a in arguments],
            "ranks": [{key: str(value) for key, value in environment.items()} for environment in told],
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()


def calibrate(model, text_file, run, nsamples=7):
    return ["calibrate", model, "-d", run, "--dataset", text_file, "--nsamples", nsamples, "--seqlen", 24,
            "--batch-size", 2, "--dtype", "float32", "--gram"]  # fmt: skip


def test_ranks_heal_as_one_process_does(tiny, prune, ranks, text_file, tmp_path):
    """Gradients are summed over ranks, every rank takes the same step, and rank 0 writes; their shares are unequal."""
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    command = ["heal", "-d", run, "--dataset", text_file, "--tokens", 2000, "--seqlen", 24, "--windows-per-step", 7,
               "--lora-rank", 4, "--lr", 0.01, "--dtype", "float32", "--rank-timeout", 60]  # fmt: skip
    made = []
    for size in (1, 2):
        out = tmp_path / f"healed by {size}"
        found = ranks(size, *command, "-o", out)
        assert [code for code, *_ in found] == [0] * size, found
        assert sum(": written" in err for _, _, err in found) == 1, found
        made.append(load_pruned(out).flap.healed)
    assert made[1].after == pytest.approx(made[0].after, rel=1e-4)
    for one, two in zip(made[0].curve, made[1].curve, strict=True):
        assert two.training == (one.training and pytest.approx(one.training, rel=1e-4))


def test_ranks_that_differ_are_named(tiny):
    """As they do with another copy of the text, or where `auto` stands for another dtype."""
    checkpoint, windows = open_checkpoint(str(tiny("llama-gqa"))), np.zeros((2, 8), np.int64)

    class Others:
        def __init__(self, **unlike):
            self.unlike = unlike

        def agree(self, mine):
            return [mine, mine, mine | self.unlike]

    refuse_unlike_ranks(Others(), checkpoint, windows, torch.float32)
    with pytest.raises(FlapError, match=r"rank 2 and rank 0 .* differ in: text"):
        refuse_unlike_ranks(Others(text="another"), checkpoint, windows, torch.float32)
    with pytest.raises(FlapError, match="differ in: --dtype"):
        refuse_unlike_ranks(Others(**{"--dtype": "bfloat16"}), checkpoint, windows, torch.float32)


def test_half_a_launcher_is_refused(flap, tiny, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    said = flap(*calibrate(tiny("llama-gqa"), text_file, tmp_path / "run"), code=1).stderr
    assert "MASTER_ADDR" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
@pytest.mark.parametrize("size,nsamples", [(2, 7), (3, 7), (3, 2)])
def test_ranks_give_the_statistics_of_one_process(ranks, mode, size, nsamples, tiny, text_file, flap, tmp_path):
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
    assert (tmp_path / "one" / "stats.safetensors").read_bytes() == (
        tmp_path / "two" / "stats.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("size,nsamples", [(2, 7), (3, 3)])
def test_ranks_share_the_sampling_of_one_process(ranks, size, nsamples, tiny, flap, tmp_path):
    """Batches of two windows: one rank may have none. Rank 0 writes the text of all."""
    model = tiny("llama-gqa")
    flap(*calibrate(model, "self", tmp_path / "alone", nsamples))
    for again in ("written", "up to date"):
        done = ranks(size, *calibrate(model, "self", tmp_path / "run", nsamples))
        assert [code for code, _, _ in done] == [0] * size, done
        assert [err.count(f"self.json: {again}") for _, _, err in done] == [1] + [0] * (size - 1)
        (tmp_path / "run" / "stats.safetensors").replace(tmp_path / "last.safetensors")
    assert (tmp_path / "run" / "self.json").read_bytes() == (tmp_path / "alone" / "self.json").read_bytes()
    assert_close(load_stats(tmp_path / "last.safetensors"), load_stats(tmp_path / "alone" / "stats.safetensors"))


@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
def test_ranks_give_the_fisher_information_of_one_process(ranks, mode, tiny, text_file, flap, tmp_path):
    model = tiny("qwen3")
    flap(*calibrate(model, text_file, tmp_path / "alone"), mode, "--fisher", "--gram")
    done = ranks(2, *calibrate(model, text_file, tmp_path / "two"), mode, "--fisher", "--gram")
    assert [code for code, _, _ in done] == [0, 0], done
    alone, two = (load_stats(tmp_path / run / "stats.safetensors") for run in ("alone", "two"))
    assert alone.fisher and alone.elimination
    assert_close(two, alone)


def test_torchrun(tiny, text_file, flap, tmp_path):
    arguments = calibrate(tiny("llama-gqa"), text_file, tmp_path / "run")
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stats.safetensors: written") == 1
    flap(*calibrate(tiny("llama-gqa"), text_file, tmp_path / "alone"))
    assert_close(*(load_stats(tmp_path / run / "stats.safetensors") for run in ("run", "alone")))
    again = torchrun(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("up to date") == 1


@pytest.mark.parametrize("mode,dying", [("--stream", 1), ("--no-stream", 0)])
def test_a_dead_rank_is_named_and_the_next_run_goes_on(ranks, mode, dying, tiny, text_file, flap, tmp_path):
    model = tiny("llama-gqa")
    arguments = [*calibrate(model, text_file, tmp_path / "run", 12), mode, "--rank-timeout", 8]
    began = time.monotonic()
    done = ranks(3, *arguments, dying=dying, DIE_AFTER=3 if mode == "--stream" else 1)
    assert time.monotonic() - began < 60
    assert done[dying][0] == -9
    assert_named(done, dying)
    assert not (tmp_path / "run" / "stats.safetensors").exists()
    done = ranks(3, *arguments)
    assert [code for code, _, _ in done] == [0, 0, 0], done
    assert ("going on with layer 1" in done[0][2]) == (mode == "--stream")
    undisturbed = ranks(3, *calibrate(model, text_file, tmp_path / "other", 12), mode)
    assert [code for code, _, _ in undisturbed] == [0, 0, 0], undisturbed
    paths = [tmp_path / run / "stats.safetensors" for run in ("run", "other")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def assert_named(done, dying):
    """Every other rank ends with one line that names the dead one."""
    for rank in {0, 1, 2} - {dying}:
        code, _, err = done[rank]
        assert code == 1, done
        [line] = [line for line in err.splitlines() if line.startswith("error:")]
        assert re.search(rf"rank {dying} .*(died|gave no sign of life)", line), line


@pytest.fixture(scope="module")
def apply(tiny, flap, text_file, tmp_path_factory):
    """Arguments that apply by least squares into a folder, of one calibration and plan."""
    run = tmp_path_factory.mktemp("planned")
    flap(*calibrate(tiny("llama-gqa"), text_file, run))
    flap("plan", "-d", run, "--ratio", 0.3)
    return lambda out, *more: ["apply", "-d", run, "--compensate", "lstsq", "--out", out, *more]


@pytest.mark.parametrize("more", [["--bias"], ["--sequential", "--no-bias"]])
def test_solves_are_the_same_by_any_number_of_ranks(more, ranks, apply, tmp_path):
    """Though one of three comes late."""
    found = {}
    for size in (1, 2, 3):
        done = ranks(size, *apply(tmp_path / f"{size}" / "pruned", *more), dying=1, LATE=size // 3)
        assert [code for code, _, _ in done] == [0] * size, done
        assert [err.count(": written") for _, _, err in done] == [1] + [0] * (size - 1)
        assert ("rank 0 alone goes on" in done[0][2]) == (size > 1 and more[0] == "--sequential")
        assert [path.name for path in (tmp_path / f"{size}").iterdir()] == ["pruned"]
        found[size] = contents(tmp_path / f"{size}" / "pruned", card=True)
    assert found[1] == found[2] == found[3]
    done = ranks(2, *apply(tmp_path / "2" / "pruned", *more))
    assert [(code, err.count("up to date")) for code, _, err in done] == [(0, 1), (0, 0)]


def test_a_rank_that_dies_while_it_solves_is_named_and_its_work_left_to_others(ranks, apply, tmp_path):
    out = tmp_path / "pruned"
    done = ranks(3, *apply(out, "--rank-timeout", 5), dying=1, DIE_AFTER=0)
    assert done[1][0] == -9
    assert_named(done, 1)
    assert not out.exists()
    done = ranks(2, *apply(out))
    assert [code for code, _, _ in done] == [0, 0], done
    assert "going on: 5 of 6 solves are there" in done[0][2]
    ranks(1, *apply(tmp_path / "alone" / "pruned"))
    assert contents(out, card=True) == contents(tmp_path / "alone" / "pruned", card=True)
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "alone"}


def test_ranks_with_nothing_to_solve_wait_for_rank_0(ranks, apply, tmp_path):
    done = ranks(2, *apply(tmp_path / "pruned")[:3], "--out", tmp_path / "pruned")
    assert [code for code, _, _ in done] == [0, 0], done
    assert "--compensate bias has nothing to share: rank 0 works alone" in done[0][2]


def test_torchrun_ends_with_a_line_that_names_the_dead_rank(tiny, text_file, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, os.environ['TESTS'])\n"
        "import forks\n"
        "if os.environ['RANK'] == '1': forks.die_after(1)\n"
        "forks.app(sys.argv[1:])\n"
    )
    arguments = calibrate(tiny("llama-gqa"), text_file, tmp_path / "run")
    done = torchrun(*arguments, script=(script,), TESTS=str(SUPPORT))
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search(r"rank 1 .* died", line), done.stderr
    assert not (tmp_path / "run" / "stats.safetensors").exists()


def test_a_failing_ranks_reason_is_told(ranks, tiny, text_file, tmp_path):
    arguments = [*calibrate(tiny("llama-gqa"), text_file, tmp_path / "run"), "--stream"]
    done = ranks(2, *arguments, dying=1, DIE_AFTER=1, FAIL=1)
    assert [code for code, _, _ in done] == [1, 1]
    assert re.search(r"rank 1 .* failed: this rank's own trouble", done[0][2]), done
    assert "error: this rank's own trouble" in done[1][2]


@pytest.mark.parametrize("present", [[0], [1]])
def test_a_rank_that_never_comes_is_named(ranks, present, tiny, text_file, tmp_path):
    arguments = [*calibrate(tiny("llama-gqa"), text_file, tmp_path / "run"), "--rank-timeout", 5]
    [(code, _, err)] = ranks(2, *arguments, present=present)
    assert code == 1
    [line] = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"rank {1 - present[0]}" in line
    assert "did not come within 5 s" in line


def test_other_commands_run_in_one_process(flap, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "only calibrate, apply and heal run under torchrun" in flap("run", "demo", code=2).stderr
