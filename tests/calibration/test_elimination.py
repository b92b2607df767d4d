"""Elimination equals removing units one by one with the least squares of METHOD.md, and plans go by it."""

import numpy as np
import pytest
import torch
from support.measured import SMALL_FISHER, calibrated, without_attention_in_layer_1

from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_stats
from flapcli.calibration import brain_surgeon as elimination
from flapcli.calibration.brain_surgeon import eliminate
from flapcli.pruning.compensation import least_squares

RIDGE = 0.05


def output_error(weight, gram, kept):
    """Mean squared output error of the refitted kept channels plus lambda |change of weight|^2, all in plain terms."""
    pruned = [j for j in range(len(gram)) if j not in kept]
    change = np.zeros_like(weight)
    change[:, pruned] = -weight[:, pruned]
    padded = gram + RIDGE * gram.diagonal().mean() * np.eye(len(gram))
    if kept:
        change[:, kept] = np.linalg.solve(
            padded[np.ix_(kept, kept)], padded[np.ix_(kept, pruned)] @ weight[:, pruned].T
        ).T
    return float(np.trace(change @ padded @ change.T))


def one_by_one(weight, gram, fisher, channels):
    """Losses at which units go: each time, that whose going raises the error least, in units of its own loss."""

    def of(units):
        return [u * channels + c for u in units for c in range(channels)]

    left, levels, level = list(range(len(fisher))), np.zeros(len(fisher)), 0.0
    while left:
        now = output_error(weight, gram, of(left))
        rises = []
        for u in left:
            own = of([u])
            alone = np.trace(weight[:, own] @ gram[np.ix_(own, own)] @ weight[:, own].T)
            rest = [v for v in left if v != u]
            rises.append(fisher[u] * (output_error(weight, gram, of(rest)) - now) / alone)
        level = max(level, min(rises))
        gone = left.pop(int(np.argmin(rises)))
        levels[gone] = level
    return levels


@pytest.mark.parametrize(("units", "channels"), [(12, 1), (5, 3), (1, 4)])
def test_equals_refits_from_scratch(units, channels):
    rng = np.random.default_rng(units)
    size = units * channels
    x = rng.normal(size=(200, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)
    gram, weight, fisher = x.T @ x / 200, rng.normal(size=(7, size)), rng.uniform(0.1, 3, units)
    found = eliminate(torch.from_numpy(weight), torch.from_numpy(gram), torch.from_numpy(fisher), RIDGE)
    np.testing.assert_allclose(found, one_by_one(weight, gram, fisher, channels), rtol=1e-8)


def test_the_errors_are_those_of_least_squares():
    """What goes first at no ridge raises the output error by what the fit of apply leaves."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)))
    weight, gram = torch.from_numpy(rng.normal(size=(4, 6))), x.T @ x / 300
    levels = eliminate(weight, gram, torch.ones(6, dtype=torch.float64), ridge=0.0)
    first = int(levels.argmin())
    kept = torch.tensor([j for j in range(6) if j != first])
    fit = least_squares(weight, kept, torch.tensor([first]), torch.zeros(6), gram, 0.0, with_bias=False)
    left = (x @ weight.T - x[:, kept] @ fit.weight.T).square().sum(1).mean()
    alone = (x[:, [first]] @ weight[:, [first]].T).square().sum(1).mean()
    torch.testing.assert_close(levels[first], left / alone)


@pytest.mark.parametrize("loud", [1, 300])
@pytest.mark.parametrize("ridge", [0.01, 1e-7])
def test_float32_eliminates_as_float64_does(loud, ridge):
    """Over several blocks of rows, with fewer tokens than channels and a channel that is louder than all others."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(400, 600, generator=made) + 1
    x[:, 7] *= loud
    gram, weight, fisher = x.T @ x / 400, torch.randn(40, 600, generator=made), torch.rand(30, generator=made)
    expected = eliminate(weight.double(), gram.double(), fisher, ridge)
    torch.testing.assert_close(eliminate(weight, gram, fisher, ridge), expected, rtol=2e-3, atol=0)


def test_a_twin_goes_at_no_loss_and_its_like_then_stays():
    """Two equal channels: either alone is worth nothing, together they are worth most."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 8)) * [5, 1, 1, 1, 1, 1, 1, 1]
    x[:, 1] = x[:, 0]
    gram = torch.from_numpy(x.T @ x / 500)
    levels = eliminate(torch.ones(3, 8), gram, torch.from_numpy((x**2).mean(0)), ridge=1e-6).numpy()
    assert sorted(levels.argsort()[[0, -1]]) == [0, 1]
    assert levels.min() < 1e-4 and levels.max() > 20


def test_several_at_once_are_ordered_and_never_fall(monkeypatch):
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(400, 40)) @ rng.normal(size=(40, 40)))
    weight, fisher = torch.from_numpy(rng.normal(size=(9, 40))), torch.from_numpy(rng.uniform(0.1, 3, 40))
    one = eliminate(weight, x.T @ x / 400, fisher)
    monkeypatch.setattr(elimination, "AT_ONCE", 0.1)
    four = eliminate(weight, x.T @ x / 400, fisher)
    assert not torch.equal(one, four) and (four > 0).all()
    assert len(set(one.argsort()[:20].tolist()) & set(four.argsort()[:20].tolist())) >= 16


def test_dead_units_and_no_text():
    """Channels that are always zero, and fewer tokens than channels."""
    x = torch.zeros(3, 6)
    x[:, 2:] = torch.randn(3, 4, generator=torch.manual_seed(0))
    levels = eliminate(torch.ones(2, 6), x.T @ x / 3, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    assert levels[:2].tolist() == [0, 0] and torch.isfinite(levels).all() and levels.max() > 0
    assert eliminate(torch.zeros(2, 6), torch.zeros(6, 6), torch.zeros(6)).tolist() == [0] * 6


def assert_same_elimination(ours, theirs):
    for key, values in theirs.elimination.items():
        assert values.dtype == np.float32 and values.max() > 0
        np.testing.assert_array_equal(ours.elimination[key], values, err_msg=str(key))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_streamed_equals_in_memory(any_tiny, stored, flap, text_file, tmp_path):
    more = ("--gram", "--gram-dtype", stored)
    whole = calibrated(flap, any_tiny, text_file, tmp_path / "memory", "--no-stream", *more)
    stream = calibrated(flap, any_tiny, text_file, tmp_path / "stream", "--stream", *more)
    assert_same_elimination(stream, whole)
    for layer in range(whole.model.num_layers):
        assert whole.elimination[layer, "attention"].shape == (whole.model.units(layer, "attention"),)


def test_the_backward_sweep_goes_on(tiny, flap, text_file, tmp_path, monkeypatch):
    from flapcli.artifacts.stats_writer import StatsWriter

    straight = calibrated(flap, tiny("qwen2"), text_file, tmp_path / "straight", "--stream", "--gram")
    write = StatsWriter.write_fisher

    def stop(self, layer, *args):
        write(self, layer, *args)
        if layer == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(StatsWriter, "write_fisher", stop)
    args = ("calibrate", tiny("qwen2"), "-d", tmp_path / "resumed", "--dataset", text_file, *SMALL_FISHER, "--fisher",
            "--gram", "--stream")  # fmt: skip
    assert "interrupted" in flap(*args, code=130).stderr
    monkeypatch.setattr(StatsWriter, "write_fisher", write)
    assert "going on with the backward pass" in flap(*args).stderr
    assert (tmp_path / "resumed" / "stats.safetensors").read_bytes() == straight.path.read_bytes()


def test_pruned_checkpoints_with_emptied_modules(tiny, prune, flap, text_file, tmp_path):
    pruned = without_attention_in_layer_1(tiny("llama-gqa"), prune, flap, tmp_path / "run")
    for mode in ("--stream", "--no-stream"):
        stats = calibrated(flap, pruned, text_file, tmp_path / mode, "--gram", mode)
        assert stats.elimination[1, "attention"].tolist() == [0]  # the group that is written in its place
        assert all(len(stats.elimination[i, "attention"]) == stats.model.units(i, "attention") for i in range(3))


def test_plan_takes_the_lowest_per_parameter(tiny, flap, text_file, tmp_path):
    model, plan = tiny("llama-gqa"), ("plan", "-d", tmp_path, "--metric", "FISHER-OBS")
    stats = calibrated(flap, model, text_file, tmp_path, "--gram")
    flap(*plan, "--ratio", 0.4)
    made = load_plan(tmp_path / "plan.yaml")
    scores = {
        (i, m, u): float(value) / stats.model.unit_parameters(m)
        for (i, m), values in stats.fisher.items()
        for u, value in enumerate(3 * stats.elimination[i, m] if m == "attention" else values)
    }
    kept = {(i, m, int(u)) for i, m in stats.fisher for u in made.kept(i, m)}
    gone = scores.keys() - kept
    last = {max((s, i, m, u) for (i, m, u), s in scores.items() if (i, m) == key)[1:] for key in stats.fisher}
    assert gone and max(scores[unit] for unit in gone) <= min(scores[unit] for unit in kept - last)
    assert "scores heads and neurons on one scale" in flap(*plan, "--attention-exponent", 2, code=2).stderr
    flap("show", tmp_path)
    flap("calibrate", model, "-d", tmp_path, "--dataset", text_file, *SMALL_FISHER, "--fisher", "--no-gram", "--force")
    assert "run `flap calibrate --gram --fisher`" in flap(*plan, "--force", code=1).stderr


def test_a_plan_by_another_weight_of_heads_is_made_anew(tiny, flap, text_file, tmp_path):
    args = ("plan", "-d", tmp_path, "--metric", "FISHER-OBS", "--ratio", 0.4)
    calibrated(flap, tiny("llama-gqa"), text_file, tmp_path, "--gram")
    flap(*args)
    path = tmp_path / "plan.yaml"
    made = path.read_text()
    assert "up to date" in flap(*args).stderr
    for older in (", elimination_weight: 2.0", ""):  # older flaps wrote no weight at all
        path.write_text(made.replace(", elimination_weight: 3.0", older))
        assert "up to date" not in flap(*args).stderr
        assert path.read_text() == made


def test_run_and_sweep_measure_what_it_needs(tiny, flap, text_file, tmp_path):
    args = (tiny("qwen2"), "--dataset", text_file, "--perplexity", text_file, *SMALL_FISHER, "--metric", "FISHER-OBS")
    flap("run", *args, "-d", tmp_path / "run", "--preset", "paper")
    flap("sweep", *args, "-d", tmp_path / "sweep", "--ratios", "0.2")
    for run in ("run", "sweep"):
        assert load_stats(tmp_path / run / "stats.safetensors").elimination is not None
