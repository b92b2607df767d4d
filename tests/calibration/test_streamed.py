"""Streamed calibration gives what the in-memory one gives, for every family and wherever hidden states stand."""

import json

import numpy as np
import pytest
import torch
from support.edits import edit_keep
from support.measured import assert_same
from support.models import FEW, make_tiny, to_bin

from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint
from flapcli.execution.device import Runtime

SMALL = ["--nsamples", 12, "--seqlen", 24, "--batch-size", 5]


def both(flap, model, text_file, folder, *more, streamed=()):
    """Statistics of the two ways."""
    made = []
    for name, options in (("memory", ["--no-stream"]), ("stream", ["--stream", *streamed])):
        run = folder / name
        flap("calibrate", model, "-d", run, "--dataset", text_file, *SMALL, *options, *more)
        assert [path.name for path in run.iterdir()] == ["stats.safetensors"]
        made.append(load_stats(run / "stats.safetensors"))
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FEW)
def test_every_family_streams_to_the_same_bits(kind, dtype, tiny, flap, text_file, tmp_path):
    memory, stream = both(flap, tiny(kind), text_file, tmp_path, "--dtype", dtype, "--gram")
    assert_same(stream, memory, gram=True)
    ours, theirs = stream.header.model_dump(), memory.header.model_dump()
    assert ours["calibration"].pop("mode") == "streamed"
    assert theirs["calibration"].pop("mode") == "in-memory"
    assert ours == theirs


@pytest.mark.parametrize("kind", ["llama-gqa", "mistral-window"])
def test_hidden_states_in_files(kind, tiny, flap, text_file, tmp_path):
    memory, stream = both(flap, tiny(kind), text_file, tmp_path, streamed=["--activation-memory", "1KB"])
    assert_same(stream, memory)


def test_other_sources(flap, text_file, tmp_path):
    """Shards, .bin files and 16-bit weights."""
    for name, folder in {
        "shards": make_tiny(tmp_path / "shards", "llama-gqa", shard="40KB", dtype=torch.bfloat16),
        "bin": to_bin(make_tiny(tmp_path / "bin", "qwen2-tied", dtype=torch.float16), 2),
    }.items():
        memory, stream = both(flap, folder, text_file, tmp_path / f"{name}-runs")
        assert_same(stream, memory)


def test_gguf_streams(flap, text_file, tmp_path):
    """The demo: 30 layers dequantised one by one."""
    args = ("--dataset", text_file, "--nsamples", 4, "--seqlen", 24, "--dtype", "float32")
    for run, mode in (("memory", "--no-stream"), ("stream", "--stream")):
        flap("calibrate", "demo", "-d", tmp_path / run, *args, mode)
    memory, stream = (load_stats(tmp_path / run / "stats.safetensors") for run in ("memory", "stream"))
    assert_same(stream, memory)


@pytest.mark.parametrize("kind", ["llama-biases", "qwen3"])
def test_pruned_checkpoints_stream(kind, tiny, prune, flap, text_file, tmp_path):
    """Layers with sizes of their own, one of them emptied."""
    run = prune(tiny(kind), tmp_path / "run", "--ratio 0.3")
    edit_keep(run, (1, "attention"))
    edit_keep(run, (1, "mlp"), keep="0-3")
    flap("apply", "-d", run)
    memory, stream = both(flap, run / "pruned", text_file, tmp_path)
    assert stream.model.layers[1].num_key_value_heads == 1
    assert_same(stream, memory)


def test_the_cache_knows_no_mode(tiny, flap, text_file, tmp_path):
    args = ("calibrate", tiny("llama-gqa"), "-d", tmp_path, "--dataset", text_file, *SMALL)
    flap(*args, "--stream")
    assert "up to date" in flap(*args, "--no-stream").stderr


def test_streaming_is_chosen_where_memory_is_short(tiny, flap, text_file, tmp_path, monkeypatch):
    from flapcli.execution import memory

    args = ("calibrate", tiny("llama-gqa"), "--dataset", text_file, *SMALL, "--dtype", "float32", "--json")
    monkeypatch.setattr(memory, "free_memory", lambda _device: 200_000)
    result = flap(*args, "-d", tmp_path / "one")
    assert "weights in float32 and a batch take 0.0 GB, cpu has 0.0 GB free: going layer by layer" in result.stderr
    assert json.loads(result.stdout)["calibration"]["mode"] == "streamed"
    held = memory.in_memory_bytes(  # without Gram sums
        open_checkpoint(str(tiny("llama-gqa"))), Runtime(torch.device("cpu"), torch.float32, 5), memory.Demand(24)
    )
    monkeypatch.setattr(memory, "free_memory", lambda _device: held)
    for gram, mode in (("--no-gram", "in-memory"), ("--gram", "streamed")):
        result = flap(*args, "-d", tmp_path / gram, gram)
        assert json.loads(result.stdout)["calibration"]["mode"] == mode


def test_a_containers_limit_counts(tmp_path):
    from flapcli.execution.memory import _cgroup_free

    assert list(_cgroup_free(tmp_path)) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert list(_cgroup_free(tmp_path)) == [450]


def test_out_of_memory_halves_an_automatic_batch(tiny, flap, text_file, tmp_path, monkeypatch):
    """A layer that runs out of memory for more than 2 windows, as the in-memory test has it."""
    from flapcli.execution import layerwise as layers

    assign = layers.LayerwiseModel._assign

    def small_machine(self, index, weights):
        layer = assign(self, index, weights)

        def refuse(_, inputs):
            if len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("out of memory")

        if index == 1:
            layer.mlp.gate_proj.register_forward_pre_hook(refuse)
        return layer

    args = ("--dataset", text_file, "--nsamples", 12, "--seqlen", 24)
    flap("calibrate", tiny("llama-gqa"), "-d", tmp_path / "expected", *args, "--no-stream")
    monkeypatch.setattr(layers.LayerwiseModel, "_assign", small_machine)
    flap("calibrate", tiny("llama-gqa"), "-d", tmp_path / "found", *args, "--stream")
    expected, found = (load_stats(tmp_path / run / "stats.safetensors") for run in ("expected", "found"))
    for key, stats in expected.modules.items():
        np.testing.assert_allclose(found.modules[key].variance, stats.variance, rtol=1e-5)


def test_gram_matrices_in_bfloat16(tiny, flap, text_file, tmp_path):
    full, half = (
        both(flap, tiny("llama-gqa"), text_file, tmp_path / dtype, "--gram", "--gram-dtype", dtype)
        for dtype in ("float32", "bfloat16")
    )
    assert_same(half[1], half[0], gram=True)
    for key in full[0].modules:
        exact = torch.from_numpy(full[0].gram(*key))
        assert torch.equal(torch.from_numpy(half[0].gram(*key)), exact.bfloat16().float())
    sizes = [(tmp_path / dtype / "stream" / "stats.safetensors").stat().st_size for dtype in ("float32", "bfloat16")]
    assert sizes[1] < 0.7 * sizes[0]


def test_sizes_of_gram_matrices_are_said_and_checked(tiny, flap, text_file, tmp_path, monkeypatch):
    import shutil

    args = ("calibrate", tiny("llama-gqa"), "-d", tmp_path / "run", "--dataset", text_file, *SMALL, "--gram")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    for mode in ("--stream", "--no-stream"):
        assert "not enough disk space" in flap(*args, mode, code=1).stderr
    monkeypatch.undo()
    assert "Gram matrices take 0.00 GB on disk (0.000 GB a layer, float32)" in flap(*args).stderr


def test_nonfinite_activations_leave_nothing(tmp_path, text_file, flap):
    from safetensors.torch import load_file, save_file

    folder = make_tiny(tmp_path / "model", "llama-gqa")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "run"
    result = flap("calibrate", folder, "-d", out, "--dataset", text_file, *SMALL, "--stream", code=1)
    assert "layer 1, mlp are NaN or infinite" in result.stderr
    assert not out.exists()


def test_device_map(tiny, flap, text_file, tmp_path):
    args = ("--dataset", text_file, *SMALL, "--dtype", "float32")
    flap("calibrate", tiny("llama-gqa"), "-d", tmp_path / "one", *args)
    flap("calibrate", tiny("llama-gqa"), "-d", tmp_path / "map", *args, "--device-map", "auto")
    one, mapped = (load_stats(tmp_path / run / "stats.safetensors") for run in ("one", "map"))
    assert_same(mapped, one)
    result = flap("calibrate", tiny("llama-gqa"), *args, "--device-map", "auto", "--stream", code=2)
    assert "leave out --device-map" in result.stderr
