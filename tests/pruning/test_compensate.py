"""Least squares does what METHOD.md says, on random data and through the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.measured import random_data
from support.pruned import IDS, load_pruned, logits, masked_dense

from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_stats
from flapcli.errors import FlapError
from flapcli.pruning.compensation import least_squares, mean_bias

KEPT, PRUNED = torch.tensor([0, 2, 3, 6, 7]), torch.tensor([1, 4, 5])


def test_without_correlation_it_is_the_bias_to_the_last_bit():
    mean = torch.tensor([1.0, -2.0, 3.0, 0.0, 4.0, 8.0, -1.0, 2.0], dtype=torch.float64)
    gram = torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=torch.float64)) + torch.outer(mean, mean)
    weight = random_data()[1]
    fit = least_squares(weight, KEPT, PRUNED, mean, gram, 0.01, with_bias=True)
    plain = mean_bias(weight, KEPT, PRUNED, mean)
    assert torch.equal(fit.weight, plain.weight)
    assert torch.equal(fit.bias, plain.bias)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_normal_equations_hold(with_bias, ridge):
    """The gradient of the ridge problem is zero at the fit: (C_KK + lambda I) Bᵀ-side = C_KP W_Pᵀ."""
    _, weight, mean, gram = random_data()
    fit = least_squares(weight, KEPT, PRUNED, mean, gram, ridge, with_bias)
    c = gram - torch.outer(mean, mean) if with_bias else gram
    kk, kp = c[KEPT][:, KEPT], c[KEPT][:, PRUNED]
    solution = (fit.weight - weight[:, KEPT]).T
    left = (kk + ridge * kk.diagonal().mean() * torch.eye(len(KEPT), dtype=torch.float64)) @ solution
    torch.testing.assert_close(left, kp @ weight[:, PRUNED].T, rtol=1e-10, atol=1e-10)


def test_a_matrix_that_rounding_left_indefinite_is_told():
    """As bfloat16 does where means are far above deviations: C loses its sign, the ridge grows and says so."""
    x, weight, _, _ = random_data(seed=1)
    x = x + 20 * x.std()
    coarse = (x.T @ x / len(x)).bfloat16().double()
    covariance = (coarse - torch.outer(x.mean(0), x.mean(0)))[KEPT][:, KEPT]
    assert torch.linalg.eigvalsh(covariance).min() < 0 < covariance.diagonal().mean()
    fit = least_squares(weight, KEPT, PRUNED, x.mean(0), coarse, 0.01, with_bias=True)
    assert fit.raised is not None and fit.raised > 0.01
    assert least_squares(weight, KEPT, PRUNED, x.mean(0), x.T @ x / len(x), 0.01, with_bias=True).raised is None
    with pytest.raises(FlapError, match="--gram-dtype float32"):
        least_squares(weight, KEPT, PRUNED, 2 * x.mean(0), coarse, 0.01, with_bias=True)


def test_it_is_the_regression_that_numpy_finds():
    x, weight, mean, gram = random_data()
    target = (x @ weight.T).numpy()
    with_one = np.c_[x[:, KEPT].numpy(), np.ones(len(x))]
    expected = np.linalg.lstsq(with_one, target, rcond=None)[0]
    fit = least_squares(weight, KEPT, PRUNED, mean, gram, 0.0, with_bias=True)
    np.testing.assert_allclose(fit.weight.T, expected[:-1], atol=1e-8)
    np.testing.assert_allclose(fit.bias, expected[-1], atol=1e-8)
    expected = np.linalg.lstsq(x[:, KEPT].numpy(), target, rcond=None)[0]
    fit = least_squares(weight, KEPT, PRUNED, mean, gram, 0.0, with_bias=False)
    np.testing.assert_allclose(fit.weight.T, expected, atol=1e-8)
    assert fit.bias is None


@pytest.mark.parametrize("with_bias", [True, False])
def test_reported_errors_are_those_of_the_data(with_bias):
    x, weight, mean, gram = random_data()
    fit = least_squares(weight, KEPT, PRUNED, mean, gram, 0.01, with_bias)
    output = x @ weight.T
    bias = fit.bias if with_bias else 0
    after = output - x[:, KEPT] @ fit.weight.T - bias
    before = (x[:, PRUNED] - mean[PRUNED]) @ weight[:, PRUNED].T
    whole = (output - output.mean(0)).square().sum()
    assert fit.after == pytest.approx(float(after.square().sum() / whole))
    assert fit.before == pytest.approx(float(before.square().sum() / whole))


@pytest.mark.parametrize("trouble", ["few tokens", "one loud channel", "far means"])
@pytest.mark.parametrize(("ridge", "with_bias"), [(0.01, True), (0.01, False), (1e-7, True)])
def test_float32_fits_as_float64_does(trouble, ridge, with_bias):
    """An oracle in float64, over several blocks of rows, on matrices that leave float32 little to go by."""
    made = torch.Generator().manual_seed(0)
    tokens, channels = (150 if trouble == "few tokens" else 900), 700
    x = torch.randn(tokens, channels, dtype=torch.float64, generator=made) + 1
    x[:, :50] += 3 * x[:, 50:100]
    if trouble == "one loud channel":
        x[:, 7] *= 1000
    if trouble == "far means":
        x += 30
    weight, order = torch.randn(40, channels, generator=made), torch.randperm(channels, generator=made)
    kept, pruned = order[:560].sort().values, order[560:].sort().values
    mean, gram = x.mean(0).float(), (x.T @ x / tokens).float()
    fit = least_squares(weight, kept, pruned, mean, gram, ridge, with_bias)
    c = gram.double() - (torch.outer(mean.double(), mean.double()) if with_bias else 0)
    kk = c[kept][:, kept]
    padded = kk + (fit.raised or ridge) * kk.diagonal().mean() * torch.eye(len(kept))
    change = torch.linalg.lstsq(padded, c[kept][:, pruned] @ weight[:, pruned].double().T, driver="gelsd").solution
    expected = weight[:, kept] + change.T
    assert (fit.weight - expected).norm() < 2e-3 * change.norm()

    def lost(kept_weight):
        off = torch.zeros(40, channels, dtype=torch.float64)
        off[:, kept], off[:, pruned] = kept_weight - weight[:, kept].double(), -weight[:, pruned].double()
        return torch.trace(off @ c @ off.T)

    least = max(float(lost(expected)), 0.0)  # below it, where rounding left C indefinite
    assert fit.after * fit.whole == pytest.approx(least, rel=1e-3, abs=1e-5 * fit.whole)
    assert float(lost(fit.weight.double())) < least * (1 + 1e-4) + 1e-6 * fit.whole


def test_a_singular_gram_is_handled():
    _, weight, mean, gram = random_data(tokens=3)
    fit = least_squares(weight, KEPT, PRUNED, mean, gram.float(), 0.0, with_bias=True)
    assert torch.isfinite(fit.weight).all()
    assert fit.after <= fit.before


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-biases", "qwen2", "qwen3"])
def test_command_writes_the_fit(kind, tiny, flap, text_file, tmp_path):
    """Through calibrate --gram, plan and apply: weights by the formula, smaller error, sliced equals masked."""
    args = ["--nsamples", "12", "--seqlen", "24", "--dtype", "float32", "--gram"]
    flap("calibrate", tiny(kind), "-d", tmp_path, "--dataset", text_file, *args)
    flap("plan", "-d", tmp_path, "--ratio", 0.3)
    flap("apply", "-d", tmp_path, "--compensate", "lstsq")
    flap("apply", "-d", tmp_path, "--compensate", "lstsq", "--mask-only", "--out", tmp_path / "masked")
    pruned = load_pruned(tmp_path / "pruned")
    torch.testing.assert_close(logits(pruned), logits(load_pruned(tmp_path / "masked")), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(pruned), logits(masked_dense(tiny(kind), tmp_path)), atol=1e-2)

    plan, stats = load_plan(tmp_path / "plan.yaml"), load_stats(tmp_path / "stats.safetensors")
    from support.models import load_dense

    dense = load_dense(tiny(kind)).model.layers[1].mlp.down_proj
    kept = torch.from_numpy(plan.kept(1, "mlp"))
    gone = torch.tensor([i for i in range(56) if i not in kept])
    mean, gram = torch.from_numpy(stats.modules[1, "mlp"].mean), torch.from_numpy(stats.gram(1, "mlp"))
    fit = least_squares(dense.weight.detach(), kept, gone, mean, gram, 0.01, with_bias=True)
    torch.testing.assert_close(pruned.model.layers[1].mlp.down_proj.weight, fit.weight.float(), rtol=1e-5, atol=1e-6)
    errors = json.loads((tmp_path / "pruned" / "config.json").read_text())["flap"]["output_error"]
    assert errors["mlp"][1] == pytest.approx([fit.before, fit.after])
    assert all(after <= before + 1e-9 for module in errors.values() for before, after in module)


def test_without_biases_nothing_is_added(tiny, flap, text_file, tmp_path):
    args = ["--nsamples", "12", "--seqlen", "24", "--dtype", "float32", "--gram"]
    flap("calibrate", tiny("llama-gqa"), "-d", tmp_path, "--dataset", text_file, *args)
    flap("plan", "-d", tmp_path, "--ratio", 0.3)
    flap("apply", "-d", tmp_path, "--compensate", "lstsq", "--no-bias")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["flap"]["biases"] == []
    assert all(p.ndim > 1 or "norm" in n for n, p in load_pruned(tmp_path / "pruned").named_parameters())
    assert torch.isfinite(logits(load_pruned(tmp_path / "pruned"), IDS)).all()


def test_lstsq_without_gram_says_what_to_do(tiny, prune, flap, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    result = flap("apply", "-d", run, "--compensate", "lstsq", code=1)
    assert "run `flap calibrate --gram`" in result.stderr


TESTS = Path(__file__).parents[1]
PEAK = """
import torch
from support.resident import begin, peak
from flapcli.pruning.compensation import least_squares

def arguments(n):
    kept, pruned = torch.arange(n).split(n * 8 // 10 + 1)
    return torch.ones(16, n), kept, pruned, torch.full((n,), 0.1), torch.eye(n).add_(0.1), 0.01, True

n = 3072
least_squares(*arguments(100))  # loads what torch loads at its first call
args = arguments(n)
before = begin()
least_squares(*args)
print((peak() - before) / (4 * n * n))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak of memory")
def test_no_more_than_two_matrices_beside_the_gram_matrix():
    """In its float32, of which the formulas as they are written would take five; in a process without other memory."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=TESTS)
    assert float(done.stdout) < 2
