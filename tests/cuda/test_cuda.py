"""Every command on a graphics card finds what the CPU finds: in memory, streamed, on several, in 16 bits."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.measured import SMALL_FISHER, assert_close
from support.torchrun import torchrun

from flapcli.artifacts.pruned_folder import load_pruned
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint
from flapcli.execution.loading import load_model

pytestmark = pytest.mark.cuda
KIND = "llama-gqa"


@pytest.fixture(scope="module")
def calibrate(tiny, flap, text_file, tmp_path_factory):
    """Calibrates on a device; returns the run folder. Asked for the same again, the one that is there."""
    made = {}

    def get(device, *more):
        if (device, *more) not in made:
            run = made[device, *more] = tmp_path_factory.mktemp(device) / "run"
            given = ("--dataset", text_file, *SMALL_FISHER, "--gram", "--fisher", "--device", device, *more)
            flap("calibrate", tiny(KIND), "-d", run, *given)
        return made[device, *more]

    return get


@pytest.fixture(scope="module")
def planned(calibrate, flap):
    """The CPU's run folder with a plan."""
    run = calibrate("cpu")
    flap("plan", "-d", run, "--ratio", 0.3)
    return run


def stats_of(run):
    return load_stats(run / "stats.safetensors")


def same_weights(ours, theirs):
    """Two pruned folders' tensors are as near as sums in another order make them; biases may be nothing but that."""
    mine, expected = (load_file(folder / "model-00001-of-00001.safetensors") for folder in (ours, theirs))
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-6 + 1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("mode", ["--no-stream", "--stream"])
def test_statistics(mode, device, calibrate):
    found, expected = (stats_of(calibrate(place, mode)) for place in (device, "cpu"))
    assert expected.fisher and expected.elimination
    assert_close(found, expected)


@pytest.mark.parametrize("mode", ["--no-stream", "--stream"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_in_16_bits(mode, dtype, device, calibrate):
    found, expected = stats_of(calibrate(device, mode, "--dtype", dtype)), stats_of(calibrate("cpu", mode))
    assert found.header.calibration.dtype == dtype
    for key, stats in expected.modules.items():
        for name in ("variance", "square_mean"):
            near(getattr(found.modules[key], name), getattr(stats, name))
        near(found.gram(*key), expected.gram(*key))


def near(found, expected):
    assert np.abs(found - expected).sum() < 0.05 * np.abs(expected).sum()


@pytest.mark.parametrize("mode", ["auto", "balanced"])
def test_a_model_spread_over_all_devices(mode, two_devices, tiny, calibrate):
    model = load_model(open_checkpoint(str(tiny(KIND))), torch.float32, torch.device(two_devices), mode)
    assert len({parameter.device for parameter in model.parameters()}) >= (1 if two_devices == "cpu" else 2)
    assert_close(stats_of(calibrate(two_devices, "--device-map", mode)), stats_of(calibrate("cpu")))


def test_ranks_take_a_device_each(two_devices, tiny, calibrate, planned, flap, text_file, tmp_path):
    """They share a calibration and its solves."""
    given = ("--dataset", text_file, *SMALL_FISHER, "--gram", "--fisher", "--device", two_devices)
    done = torchrun("calibrate", tiny(KIND), "-d", tmp_path, *given)
    assert done.returncode == 0, done.stderr
    assert_close(stats_of(tmp_path), stats_of(calibrate("cpu")))
    solve = ("apply", "-d", planned, "--compensate", "lstsq", "--out")
    done = torchrun(*solve, tmp_path / "pruned", "--device", two_devices)
    assert done.returncode == 0, done.stderr
    flap(*solve, tmp_path / "alone", "--device", "cpu")
    same_weights(tmp_path / "pruned", tmp_path / "alone")


@pytest.mark.parametrize("more", ["bias", "lstsq", "lstsq --no-bias", "lstsq --sequential"])
def test_pruned_weights(more, device, planned, flap, tmp_path):
    for place in (device, "cpu"):
        out = tmp_path / place / "pruned"
        flap("apply", "-d", planned, "--compensate", *more.split(), "--device", place, "--out", out)
    same_weights(*(tmp_path / place / "pruned" for place in (device, "cpu")))


@pytest.mark.parametrize("mode", ["--no-stream", "--stream"])
@pytest.mark.parametrize("dtype,near", [("float32", 1e-4), ("float16", 0.02), ("bfloat16", 0.02)])
def test_perplexity(mode, dtype, near, device, planned, flap, text_file, tmp_path):
    flap("apply", "-d", planned, "--out", tmp_path / "pruned")
    found = {}
    for place, type_ in ((device, dtype), ("cpu", "float32")):
        how = ("--device", place, mode, "--dtype", type_, "--seqlen", 16)
        said = flap("eval", tmp_path / "pruned", "--out", tmp_path / f"{place}.json", "--perplexity", text_file,
                    *how, "--json", "--force").stdout  # fmt: skip
        found[place] = json.loads(said)
    assert found[device]["perplexity"] == pytest.approx(found["cpu"]["perplexity"], rel=near)
    assert found[device]["baseline"]["perplexity"] == pytest.approx(found["cpu"]["baseline"]["perplexity"], rel=near)


def test_speed_and_generation(device, planned, flap, text_file, tmp_path):
    flap("apply", "-d", planned, "--out", tmp_path / "pruned")
    flap("eval", tmp_path / "pruned", "--out", tmp_path / "eval.json", "--perplexity", text_file, "--seqlen", 16,
         "--device", f"{device}:0", "--speed", "--speed-rounds", 1, "--speed-new-tokens", 4)  # fmt: skip
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["speed"]["peak_memory_bytes"] > report["size"]["bytes"]
    texts = [
        flap("generate", "fox", "--checkpoint", tmp_path / "pruned", "--max-new-tokens", 8, "--device", place,
             "--dtype", "float32", "--json").stdout
        for place in (device, "cpu")
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_the_best_run(device, tiny, flap, text_file, tmp_path):
    """All four stages and own text; a token drawn otherwise may change what little text there is."""
    given = ("--dataset", text_file, *SMALL_FISHER, "--perplexity", text_file, "--preset", "best")
    for place in (device, "cpu"):
        flap("run", tiny(KIND), "-d", tmp_path / place, *given, "--device", place)
    ours, theirs = (json.loads((tmp_path / place / "eval.json").read_text()) for place in (device, "cpu"))
    assert ours["baseline"]["perplexity"] == pytest.approx(theirs["baseline"]["perplexity"], rel=1e-4)
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.02)


def test_healing(device, planned, flap, text_file, tmp_path):
    given = ("--dataset", text_file, "--tokens", 1100, "--seqlen", 24, "--windows-per-step", 8, "--lora-rank", 4,
             "--lr", 0.01, "--dtype", "float32")  # fmt: skip
    curves = []
    for place in (device, "cpu"):
        run = tmp_path / place
        flap("apply", "-d", planned, "--out", run / "pruned")
        flap("heal", "-d", run, *given, "--device", place)
        curves.append([point.validation for point in load_pruned(run / "healed").flap.healed.curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
