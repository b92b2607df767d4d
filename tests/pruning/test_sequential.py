"""Sequential least squares, against an oracle that holds both models in memory and reads weights from the folder."""

import json

import pytest
import torch
from support.edits import edit_keep
from support.families import make_family
from support.measured import random_data
from support.models import load_dense, load_tokenizer, make_tiny
from support.pruned import load_pruned
from support.stages import contents

from flapcli.architecture.shape import MODULES
from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint
from flapcli.cli.presets import PRESETS
from flapcli.pruning.compensation import Centred, Means, least_squares, refit_errors, refit_on_means
from flapcli.pruning.sequential_fit import ProjectionFit
from flapcli.pruning.sharpness import final_norm_of
from flapcli.texts.corpus import calibration_windows
from flapcli.views.commands import apply_asked

SMALL = ["--nsamples", "12", "--seqlen", "24", "--dtype", "float32", "--gram"]
RIDGE = 0.3


@pytest.fixture(scope="module")
def calibrated(tiny, flap, text_file, tmp_path_factory):
    """Calibrates a tiny model once; returns a fresh run folder's path with its statistics and a plan."""
    made = {}

    def get(kind, ratio=0.3):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("stats") / kind
            flap("calibrate", tiny(kind), "-d", made[kind], "--dataset", text_file, *SMALL)
        run = tmp_path_factory.mktemp("run")
        (run / "stats.safetensors").symlink_to(made[kind] / "stats.safetensors")
        flap("plan", "-d", run, "--ratio", ratio)
        return run

    return get


def windows_of(tiny, kind, text_file):
    return torch.from_numpy(calibration_windows(str(text_file), load_tokenizer(tiny(kind)), 12, 24, 0))


def projection(layer, module):
    return layer.self_attn.o_proj if module == "attention" else layer.mlp.down_proj


class Watched:
    """A model's stream before each layer, between its modules and behind it, and its output projections' inputs."""

    def __init__(self, model, ids):
        self.inputs, self.ends, middles = {}, [], []
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda _m, a: self.ends.append(a[0]))
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, a: middles.append(a[0]))
            for module in MODULES:
                projection(layer, module).register_forward_pre_hook(
                    lambda _m, a, key=(i, module): self.inputs.update({key: a[0]})
                )
        model.model.norm.register_forward_pre_hook(lambda _m, a: self.ends.append(a[0]))
        with torch.no_grad():
            model(ids)
        self.before = {(i, "attention"): end for i, end in enumerate(self.ends)} | {
            (i, "mlp"): middle for i, middle in enumerate(middles)
        }
        self.after = {(i, "attention"): middle for i, middle in enumerate(middles)} | {
            (i, "mlp"): end for i, end in enumerate(self.ends[1:])
        }


def flat(x):
    return x.flatten(0, 1).double()


def modules(run, dense_model, ids, with_bias):
    """Of every module in turn: key, x, y, W0, W' and the bias's gain, float64; x and y None where nothing is kept.

    x, and the stream that y is relative to, are from the pruned folder as transformers loads it.
    """
    plan, stats = load_plan(run / "plan.yaml"), load_stats(run / "stats.safetensors")
    sliced = load_pruned(run / "pruned")
    dense, pruned = Watched(dense_model, ids), Watched(sliced, ids)
    stay = json.loads((run / "pruned" / "config.json").read_text())["flap"].get("source_layers", range(3))
    for new, i in enumerate(stay):
        for module in MODULES:
            per_unit = stats.model.channels_per_unit(module)
            kept = (torch.from_numpy(plan.kept(i, module))[:, None] * per_unit + torch.arange(per_unit)).flatten()
            old, now = projection(dense_model.model.layers[i], module), projection(sliced.model.layers[new], module)
            own = torch.zeros(48) if old.bias is None else old.bias.detach()
            gain = (torch.zeros(48) if now.bias is None else now.bias.detach()) - own
            y = flat(dense.after[i, module]) - flat(pruned.before[new, module]) - own
            if not len(kept):
                yield (i, module), None, y, None, None, gain.double()
                continue
            gone = torch.tensor([c for c in range(old.in_features) if c not in kept], dtype=torch.long)
            mean, gram = torch.from_numpy(stats.modules[i, module].mean), torch.from_numpy(stats.gram(i, module))
            start = least_squares(old.weight.detach(), kept, gone, mean, gram.double(), 0.01, with_bias).weight
            x, weight = flat(pruned.inputs[new, module]), now.weight.detach().double()
            yield (i, module), x, y, start, weight, gain.double()


def check_normal_equations(run, dense_model, ids, with_bias):
    """For every module: the gradient of the ridge problem is 0, and so is the mean of what is left over."""
    moved = []
    for _, x, y, start, weight, gain in modules(run, dense_model, ids, with_bias):
        if not with_bias:
            assert not gain.any()
        if x is None:
            if with_bias:
                torch.testing.assert_close(gain, y.mean(0), rtol=1e-4, atol=1e-4)
            continue
        left = y - x @ weight.T - gain
        if with_bias:
            torch.testing.assert_close(left.mean(0), torch.zeros(48).double(), rtol=0, atol=2e-4)
            left = left - left.mean(0)
        centred = x - x.mean(0) if with_bias else x
        gradient = left.T @ centred / len(x) - RIDGE * centred.square().mean() * (weight - start)
        assert gradient.abs().max() < 1e-4 * (y.T @ x / len(x)).abs().max() + 1e-5
        moved.append((weight - start).abs().max())
    assert sum(far > 1e-3 for far in moved) >= len(moved) - 1  # the first module may have lost nothing


@pytest.mark.parametrize("bias", ["--bias", "--no-bias"])
@pytest.mark.parametrize("kind", ["llama-biases", "qwen3"])
def test_normal_equations_hold_in_every_module(kind, bias, calibrated, tiny, flap, text_file):
    run = calibrated(kind)
    edit_keep(run, (1, "attention"), (2, "mlp"))
    flap("apply", "-d", run, "--compensate", "lstsq", "--sequential", bias)
    check_normal_equations(run, load_dense(tiny(kind)), windows_of(tiny, kind, text_file), bias == "--bias")


def test_predictions_are_as_sure_as_the_dense_models_allow(calibrated, tiny, flap, text_file):
    """By the folder alone: no factor on its logits would bring it nearer to the dense model on the calibration text."""
    run, dense, ids = calibrated("qwen3"), load_dense(tiny("qwen3")), windows_of(tiny, "qwen3", text_file)
    flap("apply", "-d", run, "--compensate", "lstsq", "--sequential")
    sliced = load_pruned(run / "pruned")
    factor = float((sliced.model.norm.weight / dense.model.norm.weight).detach().mean())
    torch.testing.assert_close(sliced.model.norm.weight, dense.model.norm.weight * factor)
    with torch.no_grad():
        z, own = dense(ids).logits.double(), sliced(ids).logits.double()
    scale = torch.tensor([1 / factor, 1.0], dtype=torch.float64, requires_grad=True)
    losses = -(z.softmax(-1) * (scale[:, None, None, None] * own).log_softmax(-1)).sum(-1).mean((1, 2))
    before, after = torch.autograd.grad(losses.sum(), scale)[0].abs()
    assert after < 0.02 * before and abs(factor - 1) > 0.005


def test_a_norm_that_does_not_scale_logits_stays(flap, text_file, tmp_path):
    """Gemma's weights are what its factors exceed 1 by."""
    dense, run = make_family(tmp_path / "dense", "gemma"), tmp_path / "run"
    flap("calibrate", dense, "-d", run, "--dataset", text_file, *SMALL)
    flap("plan", "-d", run, "--ratio", 0.3)
    flap("apply", "-d", run, "--compensate", "lstsq", "--sequential")
    name = final_norm_of(open_checkpoint(str(dense)))[0]
    assert torch.equal(load_pruned(run / "pruned").state_dict()[name], load_dense(dense).state_dict()[name])


@pytest.mark.parametrize("bias", ["--bias", "--no-bias"])
def test_layers_that_go_let_the_stream_pass(bias, calibrated, tiny, flap, text_file):
    """A whole layer emptied: without biases it leaves the checkpoint, with biases one of them acts."""
    run = calibrated("qwen3")
    edit_keep(run, (1, "attention"), (1, "mlp"))
    flap("apply", "-d", run, "--compensate", "lstsq", "--sequential", bias)
    config = json.loads((run / "pruned" / "config.json").read_text())
    assert config["num_hidden_layers"] == (3 if bias == "--bias" else 2)
    check_normal_equations(run, load_dense(tiny("qwen3")), windows_of(tiny, "qwen3", text_file), bias == "--bias")


@pytest.mark.parametrize("bias", ["--bias", "--no-bias"])
def test_pruning_nothing_changes_nothing(bias, any_tiny, flap, text_file, tmp_path):
    flap("calibrate", any_tiny, "-d", tmp_path, "--dataset", text_file, *SMALL)
    flap("plan", "-d", tmp_path, "--ratio", 0)
    flap("apply", "-d", tmp_path, "--compensate", "lstsq", "--sequential", bias)
    dense, pruned = load_dense(any_tiny).state_dict(), load_pruned(tmp_path / "pruned").state_dict()
    for name, value in pruned.items():
        torch.testing.assert_close(value, dense.get(name, torch.zeros_like(value)), rtol=1e-5, atol=1e-5)


def final_error(dense_model, folder, ids):
    """Mean square of what the last hidden state is off by."""
    dense, pruned = Watched(dense_model, ids).ends[-1], Watched(load_pruned(folder), ids).ends[-1]
    return float((dense - pruned).square().mean())


@pytest.mark.parametrize("bias", ["--bias", "--no-bias"])
@pytest.mark.parametrize("kind", ["llama-mha", "llama-biases", "mistral-window", "qwen2"])
def test_the_last_hidden_state_is_nearer(kind, bias, calibrated, tiny, flap, text_file):
    run, ids = calibrated(kind), windows_of(tiny, kind, text_file)
    flap("apply", "-d", run, "--compensate", "lstsq", bias, "--out", run / "closed")
    flap("apply", "-d", run, "--compensate", "lstsq", bias, "--sequential")
    closed, refitted = (final_error(load_dense(tiny(kind)), run / name, ids) for name in ("closed", "pruned"))
    assert refitted < 0.9 * closed


def test_it_runs_in_the_type_of_the_calibration(flap, tiny, text_file, tmp_path):
    """bfloat16 there and here, where streams are rounded too: still nearer than the closed form."""
    dense = tiny("llama-mha")
    flap("calibrate", dense, "-d", tmp_path, "--dataset", text_file, *SMALL, "--dtype", "bfloat16")
    flap("plan", "-d", tmp_path, "--ratio", 0.3)
    for way in ("--sequential", "--no-sequential"):
        flap("apply", "-d", tmp_path, "--compensate", "lstsq", way, "--out", tmp_path / way)
    ids = windows_of(tiny, "llama-mha", text_file)
    refitted, closed = (final_error(load_dense(dense), tmp_path / w, ids) for w in ("--sequential", "--no-sequential"))
    assert refitted < 0.9 * closed


def weights(folder):
    return load_pruned(folder).state_dict()


def test_batch_sizes_and_masking_change_nothing(calibrated, flap, monkeypatch):
    run = calibrated("llama-biases")
    edit_keep(run, (0, "mlp"))
    apply = ["apply", "-d", run, "--compensate", "lstsq", "--sequential"]
    flap(*apply)
    whole = weights(run / "pruned")
    for size in (1, 5):
        flap(*apply, "--batch-size", size, "--out", run / f"by-{size}")
        for name, value in weights(run / f"by-{size}").items():
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("flapcli.execution.memory.free_memory", lambda _device: 0)  # streams in files
    flap(*apply, "--batch-size", 5, "--out", run / "files")
    assert all(torch.equal(value, weights(run / "by-5")[name]) for name, value in weights(run / "files").items())
    flap(*apply, "--mask-only", "--out", run / "masked")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        logits = [load_pruned(run / name)(ids).logits for name in ("pruned", "masked")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in (run / "pruned").iterdir() if path.is_dir()) == []


@pytest.mark.parametrize("free", [0, 2**40])
def test_goes_on_with_the_layer_that_it_was_stopped_at(calibrated, flap, monkeypatch, free):
    """Every try ends at its third fit, so that it is one layer further than that before; streams in files, or not."""
    run = calibrated("llama-gqa")
    edit_keep(run, (1, "attention"), (1, "mlp"))  # a layer that leaves
    monkeypatch.setattr("flapcli.execution.memory.free_memory", lambda _device: free)
    apply = ["apply", "-d", run, "--compensate", "lstsq", "--sequential", "--no-bias"]
    flap(*apply, "--out", run / "undisturbed")
    fit, calls, said = ProjectionFit.fit, [], []

    def until_the_third(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(self)

    monkeypatch.setattr(ProjectionFit, "fit", until_the_third)
    for code in (130, 0):
        calls.clear()
        said.append(flap(*apply, code=code).stderr)
    assert "going on" not in said[0] and "going on with layer 2 of 3" in said[1]
    assert contents(run / "pruned", card=True) == contents(run / "undisturbed", card=True)
    assert [path.name for path in run.glob(".*")] == []


def test_what_is_written_is_what_later_modules_are_fitted_on(flap, text_file, tmp_path):
    """Weights in bfloat16: nearly all are what the oracle, which sees rounded ones alone, rounds to as well."""
    folder = make_tiny(tmp_path / "dense", "llama-gqa", dtype=torch.bfloat16)
    run, ids = tmp_path / "run", calibration_windows(str(text_file), load_tokenizer(folder), 12, 24, 0)
    flap("calibrate", folder, "-d", run, "--dataset", text_file, *SMALL)
    flap("plan", "-d", run, "--ratio", 0.3)
    flap("apply", "-d", run, "--compensate", "lstsq", "--sequential", "--no-bias")
    for key, x, y, start, weight, _ in modules(run, load_dense(folder), torch.from_numpy(ids), False):
        gram = x.T @ x / len(x)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        change = torch.linalg.solve(gram, x.T @ (y - x @ start.T) / len(x)).T
        same = ((start + change).bfloat16() == weight.bfloat16()).double().mean()
        assert same > 0.99, key


def test_a_second_round(calibrated, flap, tiny, text_file, tmp_path):
    """Of a checkpoint whose module is gone already: its bias takes the mean error of what came before."""
    run = calibrated("llama-gqa")
    edit_keep(run, (1, "attention"))
    flap("apply", "-d", run, "--compensate", "lstsq", "--sequential")
    flap("calibrate", run / "pruned", "-d", tmp_path, "--dataset", text_file, *SMALL)
    flap("plan", "-d", tmp_path, "--ratio", 0.3)
    flap("apply", "-d", tmp_path, "--compensate", "lstsq", "--sequential")
    ids = windows_of(tiny, "llama-gqa", text_file)
    dense, pruned = Watched(load_pruned(run / "pruned"), ids), Watched(load_pruned(tmp_path / "pruned"), ids)
    off = flat(pruned.after[1, "attention"] - dense.after[1, "attention"]).mean(0)
    torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_module_that_is_gone_without_a_bias_gains_one(calibrated, flap, tiny, text_file, tmp_path, dtype):
    run = calibrated("llama-gqa")
    edit_keep(run, (1, "attention"))
    flap("apply", "-d", run, "--compensate", "none")
    small = [dtype if word == "float32" else word for word in SMALL]
    flap("calibrate", run / "pruned", "-d", tmp_path, "--dataset", text_file, *small)
    flap("plan", "-d", tmp_path, "--ratio", 0.3)
    flap("apply", "-d", tmp_path, "--compensate", "lstsq", "--sequential")
    bias = load_pruned(tmp_path / "pruned").model.layers[1].self_attn.o_proj.bias
    assert bias.abs().max() > 0


def test_text_that_was_edited_is_another(tiny, flap, tmp_path):
    options = ["--nsamples", 8, "--seqlen", 16, "--dtype", "float32", "--gram", "--dataset", "self"]
    flap("calibrate", tiny("llama-gqa"), "-d", tmp_path, *options)
    flap("plan", "-d", tmp_path)
    path = tmp_path / "self.json"
    text = json.loads(path.read_text())
    text["windows"][3]["tokens"][5] += 1
    path.write_text(json.dumps(text))
    refused = flap("apply", "-d", tmp_path, "--compensate", "lstsq", "--sequential", code=1).stderr
    assert "the calibration text self is another one than" in refused
    assert not (tmp_path / "pruned").exists()


def test_mixture_with_own_text(tiny, flap, text_file, tmp_path):
    """Windows are drawn again from both sources; without self.json there is nothing to draw from."""
    options = ["--nsamples", 8, "--seqlen", 16, "--dtype", "float32", "--gram"]
    flap(
        "calibrate",
        tiny("llama-gqa"),
        "-d",
        tmp_path,
        "--dataset",
        f"{text_file}:0.75",
        "--dataset",
        "self:0.25",
        *options,
    )
    flap("plan", "-d", tmp_path)
    apply = ["apply", "-d", tmp_path, "--compensate", "lstsq", "--sequential"]
    flap(*apply)
    from flapcli.artifacts.stats import load_header
    from flapcli.checkpoints import open_checkpoint
    from flapcli.texts.windows import windows_of_stats

    path = tmp_path / "stats.safetensors"
    found = windows_of_stats(load_header(path), path, open_checkpoint(str(tiny("llama-gqa"))))
    own = [w["tokens"] for w in json.loads((tmp_path / "self.json").read_text())["windows"]]
    assert (
        found.tolist()
        == calibration_windows(str(text_file), load_tokenizer(tiny("llama-gqa")), 6, 16, 0).tolist() + own
    )
    (tmp_path / "self.json").unlink()
    result = flap(*apply, "--force", code=1)
    assert "self.json does not hold the text that" in result.stderr
    assert (tmp_path / "pruned" / "config.json").exists()


def test_another_text_by_now(tiny, flap, text_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    flap("calibrate", tiny("llama-gqa"), "-d", tmp_path, "--dataset", text, *SMALL)
    flap("plan", "-d", tmp_path)
    apply = ["apply", "-d", tmp_path, "--compensate", "lstsq", "--sequential"]
    text.write_text(text_file.read_text() + "!")
    assert "is another one than" in flap(*apply, code=1).stderr
    text.unlink()
    assert "is needed once more" in flap(*apply, code=1).stderr
    assert not (tmp_path / "pruned").exists()


def test_misuse(calibrated, flap, tmp_path):
    run = calibrated("llama-gqa")
    for command in (
        ["apply", "-d", run],
        ["run", "demo", "-d", tmp_path, "--preset", "paper"],
        ["sweep", "demo", "-d", tmp_path],
    ):
        result = flap(*command, "--sequential", code=2)
        assert (
            result.stderr.splitlines()[-1]
            == "error: --sequential is for --compensate lstsq: give that too, or leave --sequential out"
        )


def test_run_and_sweep_pass_it_on(tiny, flap, text_file, tmp_path):
    """Both end in the same perplexity, which is another one than without."""
    same = [tiny("llama-gqa"), "--dataset", text_file, *SMALL, "--compensate", "lstsq", "--seqlen", 24, "--no-baseline"]
    flap("run", *same, "-d", tmp_path / "run", "--preset", "paper", "--ratio", 0.3, "--sequential", "--batch-size", 5)
    made_by = json.loads((tmp_path / "run" / "pruned" / "config.json").read_text())["flap"]["made_by"]
    assert (made_by["sequential"], made_by["ridge"]) == (True, 0.3)
    asked = apply_asked(made_by, None, PRESETS["best"]).options
    assert (asked["compensate"], asked["sequential"]) == ("lstsq", True)
    assert "ridge" not in asked  # which is what --sequential makes of it
    found = {}
    for option in ("--sequential", "--no-sequential"):
        flap("sweep", *same, "-d", tmp_path / "sweep", "--ratios", 0.3, option, "--batch-size", 5)
        found[option] = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"][0]["perplexity"]
    alone = json.loads((tmp_path / "run" / "eval.json").read_text())["perplexity"]
    assert found["--sequential"] == alone
    assert found["--no-sequential"] != alone


def test_cache_and_card(calibrated, flap):
    run = calibrated("llama-gqa")
    apply = ["apply", "-d", run, "--compensate", "lstsq"]
    flap(*apply)
    path = run / "pruned" / "config.json"
    config = json.loads(path.read_text())
    assert (config["flap"]["made_by"].pop("sequential"), config["flap"]["made_by"]["ridge"]) == (False, 0.01)
    path.write_text(json.dumps(config))  # as a folder from before there was a choice
    assert "up to date" in flap(*apply).stderr
    flap(*apply, "--sequential")
    made_by = json.loads(path.read_text())["flap"]["made_by"]
    assert (made_by["sequential"], made_by["ridge"]) == (True, 0.3)
    assert "| compensation | lstsq, sequential |" in (run / "pruned" / "README.md").read_text()
    assert "lstsq, sequential" in flap("show", run / "pruned").stdout
    assert "up to date" in flap(*apply, "--sequential", "--batch-size", 3).stderr
    assert "up to date" not in flap(*apply, "--sequential", "--ridge", 0.1).stderr


def test_a_layer_that_does_more_than_add_is_refused(calibrated, flap, tiny, monkeypatch):
    """As one with norms behind its modules would: here, one whose `between_modules` is said to lie elsewhere."""
    from flapcli.checkpoints.huggingface import FolderCheckpoint as Checkpoint

    run = calibrated("llama-gqa")
    family = Checkpoint.family.func
    monkeypatch.setattr(
        Checkpoint,
        "family",
        property(lambda self: family(self).model_copy(update={"between_modules": "input_layernorm"})),
    )
    assert (
        "knows no layers like those of family llama"
        in flap("apply", "-d", run, "--compensate", "lstsq", "--sequential", code=1).stderr
    )


@pytest.mark.parametrize("with_bias", [True, False])
def test_refined_is_the_minimum(with_bias):
    """On random data no small step away from it makes the ridge problem's value smaller."""
    x, start, _, _ = random_data()
    y = x @ torch.randn(8, 6, dtype=torch.float64) + 1
    r = y - x @ start.T
    means = Means(x.mean(0), r.mean(0), x.T @ x / len(x), r.T @ x / len(x))
    weight, bias, _ = refit_on_means(start, means, RIDGE, with_bias)
    centred = x - x.mean(0) if with_bias else x
    lam = RIDGE * centred.square().mean()

    def value(weight, bias):
        off = x @ weight.T + (0 if bias is None else bias) - y
        return off.square().sum(1).mean() + lam * (weight - start).square().sum()

    least = value(weight, bias)
    for _ in range(20):
        assert value(weight + 1e-3 * torch.randn_like(weight), bias) > least
        if with_bias:
            assert value(weight, bias + 1e-3 * torch.randn_like(bias)) > least


def test_lost_is_that_of_the_data():
    x, weight, mean, gram = random_data()
    kept, gone = torch.tensor([0, 2, 3, 6, 7]), torch.tensor([1, 4, 5])
    moved, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    output = x @ weight.T
    whole = (output - output.mean(0)).square().sum()
    for gain in (bias, None):
        off = x[:, kept] @ moved.T + (0 if gain is None else gain) - output
        expected = float(off.square().sum() / whole)
        closed = least_squares(weight, kept, gone, mean, gram, 0.1, gain is not None)
        before, after = refit_errors(weight, kept, Centred(gram, mean), closed, moved, gain)
        assert (before, after) == (closed.before, pytest.approx(expected))
