"""Statistics as tests measure and compare them."""

from types import SimpleNamespace

import numpy as np
import torch
from support.edits import edit_keep
from support.models import load_tokenizer

from flapcli.artifacts.stats import load_stats
from flapcli.calibration.fisher import Sample
from flapcli.calibration.in_memory import measure as measure_workload
from flapcli.calibration.workload import Workload
from flapcli.execution.device import Runtime
from flapcli.texts.corpus import calibration_windows

SMALL_FISHER = ["--nsamples", 12, "--seqlen", 24, "--batch-size", 5, "--dtype", "float32"]
CPU = torch.device("cpu")


def measure(checkpoint, windows, device, dtype, batch_size, gram, progress, with_fisher=False) -> SimpleNamespace:
    """A calibration in memory by this process alone: what it found by layer and module."""
    sample = Sample.of(windows.shape, slice(0, len(windows)), 0, 1) if with_fisher else None
    work = Workload(checkpoint, windows, Runtime(device, dtype, batch_size), gram, sample, progress)
    layers = list(measure_workload(work))
    fields = ("modules", "grams", "fisher")
    return SimpleNamespace(
        influences=[found.influence for found in layers],
        **{f: {(i, m): v for i, found in enumerate(layers) for m, v in getattr(found, f).items()} for f in fields},
    )


def windows_of(folder, text_file, count=12, seqlen=24):
    return calibration_windows(str(text_file), load_tokenizer(folder), count, seqlen, 0)


def assert_same(ours, theirs, gram=False):
    assert ours.modules.keys() == theirs.modules.keys()
    assert ours.influences == theirs.influences is not None
    for key, stats in theirs.modules.items():
        for name, value in vars(stats).items():
            np.testing.assert_array_equal(getattr(ours.modules[key], name), value, err_msg=f"{key} {name}")
        if gram:
            np.testing.assert_array_equal(ours.gram(*key), theirs.gram(*key))


def assert_close(ours, theirs):
    """Statistics up to float32's rounding; `theirs` decide what there is of Gram matrices and Fisher information."""
    np.testing.assert_allclose(ours.influences, theirs.influences, rtol=1e-5)
    for key, stats in theirs.modules.items():
        found = ours.modules[key]
        for name in ("variance", "square_mean", "weight_square_sum", "weight_abs_mean"):
            np.testing.assert_allclose(getattr(found, name), getattr(stats, name), rtol=1e-5)
        np.testing.assert_allclose(found.mean, stats.mean, rtol=1e-5, atol=1e-5 * np.sqrt(stats.variance).max())
        gram = theirs.gram(*key)
        np.testing.assert_allclose(ours.gram(*key), gram, rtol=1e-4, atol=1e-5 * gram.max())
    for key, values in (theirs.fisher or {}).items():
        np.testing.assert_allclose(ours.fisher[key], values, rtol=1e-4, atol=1e-6 * values.max())
    for key, values in (theirs.elimination or {}).items():
        np.testing.assert_allclose(ours.elimination[key], values, rtol=1e-3, atol=1e-5 * values.max())


def calibrated(flap, model, text_file, run, *more):
    """Statistics with Fisher information."""
    flap("calibrate", model, "-d", run, "--dataset", text_file, *SMALL_FISHER, "--fisher", *more)
    assert [path.name for path in run.iterdir()] == ["stats.safetensors"]
    return load_stats(run / "stats.safetensors")


def without_attention_in_layer_1(model, prune, flap, run):
    """A pruned checkpoint in which a module has no unit left."""
    prune(model, run, "--ratio 0.3")
    edit_keep(run, (1, "attention"))
    flap("apply", "-d", run)
    return run / "pruned"


def random_data(tokens: int = 200, channels: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    x = torch.randn(tokens, channels, dtype=torch.float64) @ torch.randn(channels, channels, dtype=torch.float64)
    x += torch.randn(channels, dtype=torch.float64)
    return x, torch.randn(6, channels, dtype=torch.float64), x.mean(0), x.T @ x / tokens
