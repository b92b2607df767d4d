"""Fisher information equals that of gates by autograd, however it is measured, and plans ask for it."""

import numpy as np
import pytest
import torch
from support.measured import (
    CPU,
    SMALL_FISHER,
    assert_same,
    calibrated,
    measure,
    windows_of,
    without_attention_in_layer_1,
)
from support.models import load_dense

from flapcli.architecture.shape import MODULES
from flapcli.artifacts.stats import load_stats
from flapcli.calibration.fisher import Sample, loss_gradient
from flapcli.checkpoints import open_checkpoint
from flapcli.execution.head import drawn
from flapcli.progress import Silent


def gates_oracle(model, shape, windows):
    """Mean over tokens of the squared gradient of a gate of 1 on each unit at each token, in float64.

    Of a loss whose labels are the model's own draws.
    """
    model = model.double()
    gates = {}

    def gate(key):
        def hook(_, inputs):
            x = inputs[0]
            gates[key] = torch.ones(*x.shape[:2], shape.units(*key), dtype=torch.float64, requires_grad=True)
            return (x * gates[key].repeat_interleave(shape.channels_per_unit(key[1]), dim=-1),)

        return hook

    for i, layer in enumerate(model.model.layers):
        for module, projection in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            projection.register_forward_pre_hook(gate((i, module)))
    ids = torch.from_numpy(windows)
    logits = model(ids).logits[:, :-1]
    numbers = Sample.of(windows.shape, slice(0, len(windows)), 0, 1).numbers[:, 1:]
    labels = (logits.softmax(-1).cumsum(-1) <= numbers[..., None]).sum(-1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(gates.values()))
    return {key: gradient.square().mean((0, 1)).numpy() for key, gradient in zip(gates, gradients, strict=True)}


def test_fisher_equals_gates_by_autograd(any_tiny, text_file):
    windows = windows_of(any_tiny, text_file)
    checkpoint = open_checkpoint(str(any_tiny))
    measured = measure(checkpoint, windows, CPU, torch.float32, 5, False, Silent(), with_fisher=True)
    expected = gates_oracle(load_dense(any_tiny), checkpoint.shape, windows)
    assert measured.fisher.keys() == expected.keys()
    for key, values in expected.items():
        assert values.min() > 0
        np.testing.assert_allclose(measured.fisher[key], values, rtol=1e-3, atol=1e-5 * values.max())
        assert measured.fisher[key].dtype == np.float32


@pytest.mark.parametrize("start", [1, 2])
def test_only_tokens_of_text_have_a_loss(start):
    torch.manual_seed(0)
    head, numbers = torch.nn.Linear(6, 20), torch.rand(3, 9, dtype=torch.float64)
    states = torch.randn(3, 9, 6, requires_grad=True)
    logits = head(states)[:, start - 1 : -1].flatten(0, 1)
    labels = drawn(logits.softmax(-1), numbers[:, start:].flatten())
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), states)[0]
    torch.testing.assert_close(loss_gradient(head, states.detach(), numbers, start), expected)


def test_labels_are_drawn_as_the_model_has_it():
    probabilities = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(drawn(probabilities.expand(1000, 4), numbers), minlength=4)
    assert counts.tolist() == [200, 0, 500, 300]


@pytest.mark.parametrize(("count", "size"), [(7, 7), (176, 128), (4000, 500)])
def test_ranks_share_the_sample(count, size):
    alone = Sample.of((count, 5), slice(0, count), 3, 1)
    assert len(alone.places) == size == len(set(alone.places.tolist()))
    parts = [(at, Sample.of((count, 5), slice(at, min(at + 3, count)), 3, 1)) for at in range(0, count, 3)]
    assert [place + at for at, part in parts for place in part.places] == alone.places.tolist()
    torch.testing.assert_close(torch.cat([part.numbers for _, part in parts]), alone.numbers)
    assert all(alone.places[alone.within(slice(at, at + 3))].tolist() == (p.places + at).tolist() for at, p in parts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_statistics_stay_the_same_bits(any_tiny, dtype, flap, text_file, tmp_path):
    args = ("--dataset", text_file, *SMALL_FISHER, "--dtype", dtype, "--gram")
    for run, option in (("without", "--no-fisher"), ("with", "--fisher")):
        flap("calibrate", any_tiny, "-d", tmp_path / run, *args, option)
    without, found = (load_stats(tmp_path / run / "stats.safetensors") for run in ("without", "with"))
    assert without.fisher is None
    assert found.influences == without.influences
    for key, stats in without.modules.items():
        for name, value in vars(stats).items():
            np.testing.assert_array_equal(getattr(found.modules[key], name), value, err_msg=f"{key} {name}")
        np.testing.assert_array_equal(found.gram(*key), without.gram(*key))


def test_the_cache_takes_fisher_on_top(tiny, flap, text_file, tmp_path):
    stats = calibrated(flap, tiny("llama-gqa"), text_file, tmp_path)
    assert stats.header.settings["fisher"] is True
    args = ("calibrate", tiny("llama-gqa"), "-d", tmp_path, "--dataset", text_file, *SMALL_FISHER)
    assert "up to date" in flap(*args).stderr
    assert "up to date" in flap(*args, "--fisher").stderr
    assert "written" in flap(*args, "--force").stderr
    assert load_stats(tmp_path / "stats.safetensors").fisher is None
    assert "written" in flap(*args, "--fisher").stderr


def test_files_of_before_the_option_still_read(tiny, flap, text_file, tmp_path):
    """Their settings do not speak of it."""
    from dataclasses import replace

    from flapcli.artifacts.stats_writer import LayerStats, save_stats

    args = ("calibrate", tiny("llama-gqa"), "-d", tmp_path, "--dataset", text_file, *SMALL_FISHER)
    flap(*args)
    stats = load_stats(tmp_path / "stats.safetensors")
    settings = {key: value for key, value in stats.header.settings.items() if key != "fisher"}
    old = replace(stats, header=stats.header.model_copy(update={"settings": settings}))
    modules = ({m: old.modules[i, m] for m in MODULES} for i in range(old.model.num_layers))
    save_stats(old.path, old.header, [LayerStats(*both, {}) for both in zip(old.influences, modules, strict=True)])
    assert load_stats(old.path).fisher is None
    assert "up to date" in flap(*args).stderr
    assert "written" in flap(*args, "--fisher").stderr


def test_batches_change_nothing_beyond_rounding(tiny, text_file):
    folder = tiny("qwen3")
    windows, checkpoint = windows_of(folder, text_file), open_checkpoint(str(folder))
    one, three = (
        measure(checkpoint, windows, CPU, torch.float32, size, False, Silent(), with_fisher=True).fisher
        for size in (1, 3)
    )
    for key, values in one.items():
        np.testing.assert_allclose(three[key], values, rtol=1e-4, atol=1e-6 * values.max())


def test_out_of_memory_in_the_backward_pass_halves_the_batch(tiny, text_file, monkeypatch):
    """A real model whose second layer can't hold the gradient of more than 2 windows."""
    from flapcli.calibration import in_memory as calibrate

    folder = tiny("llama-gqa")
    windows, checkpoint = windows_of(folder, text_file), open_checkpoint(str(folder))
    expected = measure(checkpoint, windows, CPU, torch.float32, 2, False, Silent(), with_fisher=True)
    load = calibrate.load_model

    def small_machine(*args):
        model = load(*args)

        def refuse(_module, _inputs, output):
            def fail(gradient):
                if len(gradient) > 2:
                    raise torch.OutOfMemoryError("out of memory")

            if output.requires_grad:
                output.register_hook(fail)

        model.model.layers[1].mlp.gate_proj.register_forward_hook(refuse)
        return model

    monkeypatch.setattr(calibrate, "load_model", small_machine)
    found = measure(checkpoint, windows, CPU, torch.float32, None, False, Silent(), with_fisher=True)
    for key, values in expected.fisher.items():
        np.testing.assert_allclose(found.fisher[key], values, rtol=1e-4, atol=1e-6 * values.max())
        np.testing.assert_allclose(found.modules[key].variance, expected.modules[key].variance, rtol=1e-5)


@pytest.mark.parametrize(("stopped", "told"), [(3, 10), (5, 12)])
def test_resumed_equals_straight(stopped, told, tiny, flap, text_file, tmp_path, monkeypatch):
    """Interrupted after a checkpoint of some batches, on the way back too, the next run goes on to the same bits."""
    from flapcli.calibration.recorder import Recorder
    from flapcli.storage import resume

    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0)
    monkeypatch.setattr(resume, "TIMES_ITS_COST", 0)
    straight = calibrated(flap, tiny("qwen2"), text_file, tmp_path / "straight")
    commit, calls = Recorder.commit, []

    def stop(self):
        calls.append(self)
        if len(calls) == stopped:
            raise KeyboardInterrupt
        commit(self)

    monkeypatch.setattr(Recorder, "commit", stop)
    args = ("calibrate", tiny("qwen2"), "-d", tmp_path / "resumed", "--dataset", text_file, *SMALL_FISHER, "--fisher")
    assert "interrupted" in flap(*args, code=130).stderr
    monkeypatch.setattr(Recorder, "commit", commit)
    assert f"going on after window {told} of 12" in flap(*args).stderr
    resumed = load_stats(tmp_path / "resumed" / "stats.safetensors")
    for key, values in straight.fisher.items():
        np.testing.assert_array_equal(resumed.fisher[key], values)


@pytest.mark.parametrize(("dtype", "memory"), [("float32", "8GB"), ("bfloat16", "1KB")])
def test_streamed_equals_in_memory(any_tiny, dtype, memory, flap, text_file, tmp_path, monkeypatch):
    """In memory with sums that are taken in batch by batch, as on a CPU; streamed several at once, as on a GPU."""
    more = ("--dtype", dtype)
    whole = calibrated(flap, any_tiny, text_file, tmp_path / "memory", "--no-stream", *more)
    monkeypatch.setattr("flapcli.calibration.recorder.AT_ONCE", {})
    stream = calibrated(
        flap, any_tiny, text_file, tmp_path / "stream", "--stream", "--activation-memory", memory, *more
    )
    assert stream.header.calibration.mode == "streamed"
    assert_same(stream, whole)
    for key, values in whole.fisher.items():
        np.testing.assert_array_equal(stream.fisher[key], values, err_msg=str(key))


@pytest.mark.parametrize("memory", ["8GB", "1KB"])
@pytest.mark.parametrize("layer", [2, 1, 0])
def test_the_backward_sweep_goes_on(layer, memory, tiny, flap, text_file, tmp_path, monkeypatch):
    from flapcli.calibration.streaming import BackwardPass

    straight = calibrated(flap, tiny("qwen2"), text_file, tmp_path / "straight", "--stream")
    run_layer = BackwardPass._layer

    def stop(self, at, *args):
        if at.index == layer:
            raise KeyboardInterrupt
        run_layer(self, at, *args)

    monkeypatch.setattr(BackwardPass, "_layer", stop)
    args = ("calibrate", tiny("qwen2"), "-d", tmp_path / "resumed", "--dataset", text_file, *SMALL_FISHER, "--fisher",
            "--stream", "--activation-memory", memory)  # fmt: skip
    assert "interrupted" in flap(*args, code=130).stderr
    monkeypatch.setattr(BackwardPass, "_layer", run_layer)
    assert f"going on with the backward pass below layer {layer + 1} of 3" in flap(*args).stderr
    assert (tmp_path / "resumed" / "stats.safetensors").read_bytes() == straight.path.read_bytes()
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["stats.safetensors"]


def test_lost_hidden_states_are_made_again(tiny, flap, text_file, tmp_path, monkeypatch):
    """As where a rank goes on on another machine."""
    from flapcli.calibration.streaming import BackwardPass

    straight = calibrated(flap, tiny("qwen2"), text_file, tmp_path / "straight", "--stream")
    run_layer = BackwardPass._layer

    def stop(self, layer, *args):
        if layer.index == 1:
            for path in self.kept.resume.folder.glob("kept-*.bin"):
                path.unlink()
            raise KeyboardInterrupt
        run_layer(self, layer, *args)

    monkeypatch.setattr(BackwardPass, "_layer", stop)
    args = (
        "calibrate",
        tiny("qwen2"),
        "-d",
        tmp_path / "run",
        "--dataset",
        text_file,
        *SMALL_FISHER,
        "--fisher",
        "--stream",
    )
    assert "interrupted" in flap(*args, code=130).stderr
    monkeypatch.setattr(BackwardPass, "_layer", run_layer)
    flap(*args)
    assert (tmp_path / "run" / "stats.safetensors").read_bytes() == straight.path.read_bytes()


def test_space_for_streaming_is_said_and_checked(tiny, flap, text_file, tmp_path, monkeypatch):
    import shutil

    args = ("calibrate", tiny("llama-gqa"), "-d", tmp_path / "run", "--dataset", text_file, *SMALL_FISHER, "--stream")
    usage = shutil.disk_usage(tmp_path)
    # 12 windows of 24 tokens of 48 float32 numbers before and after a layer.
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=3 * 12 * 24 * 48 * 4))
    flap(*args)
    assert "not enough disk space" in flap(*args, "--fisher", code=1).stderr
    monkeypatch.undo()
    assert "keeps its windows' hidden states between all layers on disk" in flap(*args, "--fisher").stderr


def test_device_map(tiny, flap, text_file, tmp_path):
    one = calibrated(flap, tiny("llama-tied"), text_file, tmp_path / "one")
    spread = calibrated(flap, tiny("llama-tied"), text_file, tmp_path / "map", "--device-map", "auto")
    for key, values in one.fisher.items():
        np.testing.assert_allclose(spread.fisher[key], values, rtol=1e-5)


def test_pruned_checkpoints_with_emptied_modules(tiny, prune, flap, text_file, tmp_path):
    pruned = without_attention_in_layer_1(tiny("llama-gqa"), prune, flap, tmp_path / "run")
    stats = calibrated(flap, pruned, text_file, tmp_path / "again")
    assert stats.fisher[1, "attention"].tolist() == [0]  # the group that is written in its place
    assert all(len(stats.fisher[i, m]) == stats.model.units(i, m) for i in range(3) for m in MODULES)


def test_gradients_that_are_not_finite_are_named(tiny, flap, text_file, tmp_path, monkeypatch):
    from flapcli.calibration import recorder as recording

    monkeypatch.setattr(recording, "gate_gradients", lambda x, g, c: torch.full((x.shape[0], x.shape[1] // c), np.nan))
    args = ("calibrate", tiny("llama-gqa"), "-d", tmp_path / "run", "--dataset", text_file, *SMALL_FISHER, "--fisher")
    assert "gradients of layer 2, mlp are NaN or infinite" in flap(*args, code=1).stderr
    assert not (tmp_path / "run").exists()


def test_plan_by_fisher(tiny, flap, text_file, tmp_path):
    model, plan = tiny("llama-gqa"), ("plan", "-d", tmp_path, "--metric", "FISHER")
    calibrated(flap, model, text_file, tmp_path)
    flap(*plan)
    assert "metric: FISHER" in (tmp_path / "plan.yaml").read_text()
    assert "up to date" in flap(*plan).stderr
    assert "scores heads and neurons on one scale" in flap(*plan, "--attention-exponent", 2, code=2).stderr
    assert "is defined with WIFN" in flap(*plan, "--method", "wanda-sp", code=2).stderr
    flap("apply", "-d", tmp_path)
    flap("show", tmp_path)
    flap("report", "-d", tmp_path)
    flap("calibrate", model, "-d", tmp_path, "--dataset", text_file, *SMALL_FISHER, "--force")
    assert "has no Fisher information, which --metric FISHER needs: run `flap calibrate --fisher`" in (
        flap(*plan, "--force", code=1).stderr
    )


def test_run_by_fisher_measures_it(tiny, flap, text_file, tmp_path):
    flap("run", tiny("qwen2"), "-d", tmp_path, "--dataset", text_file, "--perplexity", text_file, *SMALL_FISHER,
         "--preset", "paper", "--metric", "FISHER")  # fmt: skip
    assert load_stats(tmp_path / "stats.safetensors").fisher is not None
