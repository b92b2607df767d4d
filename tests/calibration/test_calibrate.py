"""Statistics equal a plain computation in float64, whatever the batch size."""

import numpy as np
import pytest
import torch
from support.measured import CPU, measure, windows_of
from support.models import load_dense, load_tokenizer, make_tiny

from flapcli.artifacts.stats import load_stats
from flapcli.calibration.moments import Moments
from flapcli.checkpoints import open_checkpoint
from flapcli.errors import FlapError
from flapcli.progress import Silent
from flapcli.texts.corpus import calibration_windows


def run(folder, windows, batch_size=None, gram=False, dtype=torch.float32):
    return measure(open_checkpoint(str(folder)), windows, CPU, dtype, batch_size, gram, Silent())


def test_moments_do_not_depend_on_batches():
    torch.manual_seed(0)
    x = torch.randn(1000, 7, dtype=torch.float64) * torch.logspace(-3, 3, 7) + torch.linspace(-50, 50, 7)
    x = x.float()
    merged = Moments.of(x[:1])
    for start, end in ((1, 3), (3, 500), (500, 501), (501, 1000)):
        merged.merge(Moments.of(x[start:end]))
    exact = x.double()
    assert merged.count == 1000
    torch.testing.assert_close(merged.mean, exact.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(merged.variance, exact.var(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(merged.square_mean, exact.square().mean(0), rtol=1e-5, atol=0)


def test_statistics_equal_a_plain_computation(any_tiny, text_file):
    windows = windows_of(any_tiny, text_file)
    measured = run(any_tiny, windows, gram=True)
    model = load_dense(any_tiny)
    seen: dict = {}

    def keep(key):
        def hook(_, inputs):
            seen[key] = inputs[0].flatten(0, 1).double()

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(keep((i, "attention")))
        layer.mlp.down_proj.register_forward_pre_hook(keep((i, "mlp")))
    with torch.no_grad():
        model(torch.from_numpy(windows))
    for (i, module), x in seen.items():
        stats = measured.modules[i, module]
        layer = model.model.layers[i]
        weight = (layer.self_attn.o_proj if module == "attention" else layer.mlp.down_proj).weight.double()
        scale = x.std(0).numpy()
        np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-5, atol=1e-5 * scale.max())
        np.testing.assert_allclose(stats.variance, x.var(0), rtol=1e-4)
        np.testing.assert_allclose(stats.square_mean, x.square().mean(0), rtol=1e-4)
        np.testing.assert_allclose(stats.weight_square_sum, weight.square().sum(0).detach(), rtol=1e-6)
        np.testing.assert_allclose(stats.weight_abs_mean, weight.abs().mean(0).detach(), rtol=1e-6)
        np.testing.assert_allclose(measured.grams[i, module], x.T @ x / len(x), rtol=1e-4, atol=1e-4 * scale.max() ** 2)


def test_batch_size_changes_nothing_beyond_rounding(any_tiny, text_file):
    windows = windows_of(any_tiny, text_file)
    one, three, every = (run(any_tiny, windows, size).modules for size in (1, 3, len(windows)))
    for key, stats in every.items():
        for other in (one[key], three[key]):
            for field in ("variance", "square_mean"):
                np.testing.assert_allclose(getattr(other, field), getattr(stats, field), rtol=1e-5)
            np.testing.assert_allclose(other.mean, stats.mean, rtol=1e-5, atol=1e-5 * np.sqrt(stats.variance).max())


def test_windows_are_those_of_the_method(tiny, text_file):
    import random

    tokenizer = load_tokenizer(tiny("llama-gqa"))
    ids = tokenizer(text_file.read_text()).input_ids
    draw = random.Random(7)
    starts = [draw.randint(0, len(ids) - 24 - 1) for _ in range(5)]
    found = calibration_windows(str(text_file), tokenizer, 5, 24, 7)
    assert found.tolist() == [ids[s : s + 24] for s in starts]


def test_out_of_memory_halves_an_automatic_batch(tiny, text_file, monkeypatch):
    """A real model that runs out of memory in its second layer for more than 2 windows, after the first one's sums."""
    from flapcli.calibration import in_memory as calibrate

    folder = tiny("llama-gqa")
    windows = windows_of(folder, text_file)
    expected = run(folder, windows, 2, gram=True)
    load = calibrate.load_model

    def small_machine(*args):
        model = load(*args)

        def refuse(_, inputs):
            if len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("out of memory")

        model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(refuse)
        return model

    monkeypatch.setattr(calibrate, "load_model", small_machine)
    found = run(folder, windows, None, gram=True)
    for key, stats in expected.modules.items():
        np.testing.assert_allclose(found.modules[key].variance, stats.variance, rtol=1e-5)
        np.testing.assert_allclose(found.grams[key], expected.grams[key], rtol=1e-4, atol=1e-6)
    with pytest.raises(FlapError, match="lower --batch-size"):
        run(folder, windows, 4)


def test_non_finite_activations_are_named(tmp_path, text_file, flap):
    from safetensors.torch import load_file, save_file

    folder = make_tiny(tmp_path / "model", "llama-gqa")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    before = {path: path.read_bytes() for path in folder.iterdir()}
    out = tmp_path / "run"
    result = flap("calibrate", folder, "-d", out, "--dataset", text_file, "--nsamples", 2, "--seqlen", 8, code=1)
    assert "layer 1, mlp are NaN or infinite" in result.stderr
    assert not out.exists()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before  # the source is as it was


def test_one_calibration_serves_every_metric(tiny, prune, flap, tmp_path):
    run_dir = prune(tiny("llama-gqa"), tmp_path / "run")
    before = (run_dir / "stats.safetensors").read_bytes()
    plans = {flap("plan", "-d", run_dir, "--metric", m, "--json").stdout for m in ("IFV", "WIFV", "WIFN")}
    assert len(plans) == 3
    assert (run_dir / "stats.safetensors").read_bytes() == before


def test_gram_matrices_are_in_the_file(tiny, flap, text_file, tmp_path):
    args = ("--dataset", text_file, "--nsamples", 4, "--seqlen", 16, "--dtype", "float32")
    flap("calibrate", tiny("llama-gqa"), "-d", tmp_path, *args, "--gram")
    stats = load_stats(tmp_path / "stats.safetensors")
    for (layer, module), values in stats.modules.items():
        np.testing.assert_allclose(np.diag(stats.gram(layer, module)), values.square_mean, rtol=1e-4)
    assert "up to date" in flap("calibrate", tiny("llama-gqa"), "-d", tmp_path, *args).stderr
