"""What the model writes follows its own distribution and the seed, and nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.models import load_dense, load_tokenizer
from support.tokenizers_like import BOS, opening_with

from flapcli.artifacts.stats import load_stats
from flapcli.progress import Silent
from flapcli.storage import resume
from flapcli.texts.sampling import Drawn, Sampling, sample_windows

EOS = 2


def sample(folder, nsamples, seqlen, seed=0, batch_size=None, tokenizer=None):
    tokenizer = tokenizer or load_tokenizer(folder)
    return sample_windows(load_dense(folder), tokenizer, Sampling(nsamples, seqlen, seed, batch_size), Silent())


def chi_square_fits(counts, expected):
    """Whether counts are drawn from what is expected, rare outcomes thrown together; 4 standard deviations."""
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_the_second_token_follows_the_softmax_of_the_first(tiny):
    folder, count = tiny("llama-gqa"), 4000
    windows = sample(folder, count, 2, tokenizer=opening_with("<s> $A", load_tokenizer(folder)))
    assert set(windows[:, 0]) == {BOS}
    with torch.no_grad():
        logits = load_dense(folder)(torch.tensor([[BOS]])).logits[0, -1]
    counts = np.bincount(windows[:, 1], minlength=len(logits))
    assert chi_square_fits(counts, count * torch.softmax(logits, -1).numpy())
    assert not chi_square_fits(counts, count * torch.softmax(logits / 0.9, -1).numpy())  # so a fault would show
    top = torch.where(logits >= logits.topk(50).values[-1], logits, -torch.inf)
    assert (counts[torch.isinf(top).numpy()] > 0).any()


@pytest.mark.parametrize("kind", ["llama-gqa", "mistral-window", "qwen3"])
def test_surprise_equals_entropy_at_every_place(tiny, kind):
    """Of text drawn from p, the mean of -log p(token) is the mean entropy: read without the cache of keys."""
    windows = sample(tiny(kind), 256, 24)
    with torch.no_grad():
        logs = torch.log_softmax(load_dense(tiny(kind))(torch.from_numpy(windows)).logits.double(), -1)[:, :-1]
    surprise = -logs.gather(-1, torch.from_numpy(windows)[:, 1:, None])[..., 0]
    entropy = -(logs.exp() * logs).sum(-1)
    excess = surprise - entropy
    assert excess.mean().abs() < 4 * excess.std() / excess.numel() ** 0.5
    late = excess[:, -8:]
    assert late.mean().abs() < 4 * late.std() / late.numel() ** 0.5
    assert entropy.std() > 0.1  # the distribution depends on what came before, so a wrong place would show
    ends = np.argwhere(windows == EOS)
    assert len(ends) and (ends[:, 1] < 23).any()  # an end of text is a token like others


@pytest.mark.parametrize("bos", ["<s>", None])
def test_without_a_bos_before_texts_first_tokens_are_uniform(tiny, bos):
    folder = tiny("llama-gqa")
    tokenizer = load_tokenizer(folder)
    tokenizer.bos_token = bos
    first = sample(folder, 6000, 2, tokenizer=tokenizer)[:, 0]
    special = set(tokenizer.all_special_ids)
    assert not special & set(first)
    plain = [token for token in range(len(tokenizer)) if token not in special]
    counts = np.bincount(first, minlength=len(tokenizer))[plain]
    assert chi_square_fits(counts, np.full(len(plain), len(first) / len(plain)))


def test_windows_follow_the_seed_and_not_the_batches(tiny):
    folder = tiny("llama-gqa")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = sample(folder, 12, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.tolist() == sample(folder, 12, 16).tolist() == sample(folder, 12, 16, batch_size=5).tolist()
    assert whole[:7].tolist() == sample(folder, 7, 16).tolist()
    other = sample(folder, 12, 16, seed=1)
    assert all(a != b for a, b in zip(whole.tolist(), other.tolist(), strict=True))
    assert len({tuple(window) for window in whole.tolist()}) == 12


@pytest.fixture
def calibrate(tiny, flap, tmp_path):
    def call(run, *more, nsamples=6, code=0):
        small = ["--nsamples", nsamples, "--seqlen", 24, "--dtype", "float32", "--dataset", "self"]
        return flap("calibrate", tiny("llama-gqa"), "-d", tmp_path / run, *small, *more, code=code)

    return call


def test_cut_short_it_goes_on_to_the_same_windows(calibrate, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0)
    monkeypatch.setattr(resume, "TIMES_ITS_COST", 0)
    take, parts = Drawn.take, []

    def stop(self, part, ids):
        take(self, part, ids)
        parts.append(part.start)
        if part.start == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Drawn, "take", stop)
    calibrate("one", "--batch-size", 2, code=130)
    assert parts == [0, 2]
    calibrate("one", "--batch-size", 2)
    assert parts == [0, 2, 4]
    monkeypatch.setattr(Drawn, "take", take)
    tokens = [window["tokens"] for window in json.loads((tmp_path / "one" / "self.json").read_text())["windows"]]
    assert tokens == sample(tiny("llama-gqa"), 6, 24, batch_size=2).tolist()
    assert not list((tmp_path / "one").glob(".self*"))


def test_show_prints_it(calibrate, flap, tmp_path):
    calibrate("one", "--gram", "--fisher")
    shown = flap("show", tmp_path / "one" / "self.json").stdout
    assert "text that" in shown and "24 tokens" in shown
    data = json.loads(flap("show", tmp_path / "one" / "self.json", "--json").stdout)
    assert data == {"self": json.loads((tmp_path / "one" / "self.json").read_text())}
    assert "Gram matrices (float32), Fisher information" in flap("show", tmp_path / "one").stdout


def test_the_text_is_an_artifact(calibrate, tiny, tmp_path):
    said = calibrate("one").stderr
    assert "self.json: written" in said
    path = tmp_path / "one" / "self.json"
    text = json.loads(path.read_text())
    tokens = [window["tokens"] for window in text["windows"]]
    assert tokens == sample(tiny("llama-gqa"), 6, 24).tolist()
    tokenizer = load_tokenizer(tiny("llama-gqa"))
    assert [window["text"] for window in text["windows"]] == [tokenizer.decode(ids) for ids in tokens]
    assert load_stats(tmp_path / "one" / "stats.safetensors").header.calibration.source_sha256 is None

    before = path.read_bytes(), path.stat().st_mtime_ns
    assert "self.json" not in calibrate("one").stderr  # the statistics answer: nothing is sampled
    (tmp_path / "one" / "stats.safetensors").unlink()
    assert "self.json: up to date" in calibrate("one").stderr
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert "self.json: written" in calibrate("one", "--force").stderr
    assert path.read_bytes() == before[0]
    assert "self.json: written" in calibrate("one", "--seed", 1).stderr
    assert path.read_bytes() != before[0]


def test_another_model_of_that_shape_writes_its_own(calibrate, flap, tiny, tmp_path):
    calibrate("one")
    other = shutil.copytree(tiny("llama-gqa"), tmp_path / "other")
    said = flap("calibrate", other, "-d", tmp_path / "one", "--nsamples", 6, "--seqlen", 24, "--dtype", "float32",
                "--dataset", "self").stderr  # fmt: skip
    assert "self.json: written" in said


def test_layer_by_layer_takes_text_that_was_sampled_elsewhere(calibrate, tmp_path):
    said = calibrate("streamed", "--stream", code=1).stderr.splitlines()[-1]
    assert "sampling needs the whole model in memory" in said
    assert str(tmp_path / "streamed" / "self.json") in said
    calibrate("whole")
    (tmp_path / "streamed").mkdir(exist_ok=True)
    (tmp_path / "streamed" / "self.json").write_bytes((tmp_path / "whole" / "self.json").read_bytes())
    assert "self.json: up to date" in calibrate("streamed", "--stream").stderr
    streamed, whole = (load_stats(tmp_path / run / "stats.safetensors") for run in ("streamed", "whole"))
    assert streamed.header.calibration.mode == "streamed"
    for key, stats in whole.modules.items():
        np.testing.assert_allclose(streamed.modules[key].variance, stats.variance, rtol=1e-5)
    assert "sampling needs" in calibrate("streamed", "--stream", nsamples=7, code=1).stderr


def test_a_foreign_self_json_is_kept(calibrate, tmp_path):
    (tmp_path / "run").mkdir()
    for content in ("{}", "no json", '{"format": "flap-eval/1"}'):
        (tmp_path / "run" / "self.json").write_text(content)
        assert "no text that flap sampled" in calibrate("run", code=1).stderr
        assert (tmp_path / "run" / "self.json").read_text() == content


def test_perplexity_is_not_read_on_the_models_own_text(calibrate, flap, tmp_path):
    calibrate("run")
    flap("plan", "-d", tmp_path / "run")
    flap("apply", "-d", tmp_path / "run")
    assert "wikitext2" in flap("eval", "-d", tmp_path / "run", code=1).stderr
