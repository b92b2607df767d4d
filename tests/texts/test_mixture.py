"""Several calibration texts are each what they are alone, in the shares asked for."""

import hashlib
import json

import numpy as np
import pytest
import torch
from support.measured import measure
from support.models import load_tokenizer

from flapcli.artifacts.stats import load_header, load_stats
from flapcli.calibration.moments import Moments
from flapcli.checkpoints import open_checkpoint
from flapcli.errors import UsageError
from flapcli.execution.device import Runtime
from flapcli.execution.ranks import Ranks
from flapcli.execution.settings import CalibrateOptions
from flapcli.progress import Silent
from flapcli.texts.calibration_text import CalibrationText
from flapcli.texts.corpus import calibration_windows
from flapcli.texts.mixture import Mixture, combined

CPU = torch.device("cpu")
SMALL = ["--seqlen", 24, "--dtype", "float32"]


@pytest.fixture
def fox(tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 200)
    return path


@pytest.mark.parametrize(
    ("named", "text", "counts"),
    [
        (["a"], "a", [10]),
        (["a:3"], "a", [10]),
        (["a", "b"], "a:0.5+b:0.5", [5, 5]),
        (["a:3", "b:1"], "a:0.75+b:0.25", [8, 2]),  # 7.5 and 2.5: the first named wins the tie
        (["a", "b", "c"], "a:0.333333+b:0.333333+c:0.333333", [4, 3, 3]),
        (["a:0.5", "b:0.26", "c:0.24"], "a:0.5+b:0.26+c:0.24", [5, 3, 2]),
        (["C:/x.txt", "p+q.txt:1e-1", "u:v.txt"], "C:/x.txt:0.47619+p+q.txt:0.047619+u:v.txt:0.47619", None),
    ],
)
def test_shares(named, text, counts):
    assert combined(named) == text
    mixture = Mixture.read(text)
    if counts:
        assert mixture.counts(10) == counts
    else:
        assert mixture.sources == ("C:/x.txt", "p+q.txt", "u:v.txt")


def test_an_existing_file_is_no_weight_and_no_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:2", "a:0.5+b:0.5"):
        (tmp_path / name).write_text("x")
        assert combined([name]) == name
        assert Mixture.read(name).sources == (name,)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_are_positive_numbers(weight, flap, tmp_path):
    result = flap("calibrate", "demo", "-d", tmp_path / "run", "--dataset", f"pydoc:{weight}", code=2)
    assert result.stderr.splitlines()[-1] == f"error: --dataset pydoc:{weight}: a weight is a positive number"


def test_misuse_is_one_line(flap, tmp_path, text_file):
    def refused(*named, more=()):
        options = [part for name in named for part in ("--dataset", name)]
        result = flap("calibrate", "demo", "-d", tmp_path / "run", *options, *more, code=2)
        return result.stderr.splitlines()[-1]

    assert "pydoc is given twice" in refused("pydoc", "pydoc:2")
    assert "its share of 3 windows is none" in refused("pydoc:9", "self", more=("--nsamples", 3))
    assert "give wikitext2, ptb, c4, pydoc, self or a file" in refused("pydoc", "sefl")
    assert "no such file" in refused("pydoc", "nowhere.txt:2")
    with pytest.raises(UsageError, match="self"):
        Mixture.read("pydoc:0.99+self:0.01").counts(10)
    assert "give wikitext2, ptb, c4, pydoc or" in flap("eval", "demo", "--perplexity", "self", code=2).stderr
    assert not (tmp_path / "run").exists()


def test_many_texts_and_their_names_once_more(tmp_path):
    """The joined name may be longer than a file's may be, and its parts give it again."""
    named = [str(tmp_path / f"{'text' * 8}{i}.txt:{i + 1}") for i in range(12)]
    text = combined(named)
    assert len(Mixture.read(text).sources) == 12
    assert combined(Mixture.read(text).named) == text
    assert combined(Mixture.read("pydoc").named) == "pydoc"


def windows_of(folder, dataset, nsamples, out):
    options = CalibrateOptions(dataset, nsamples, 24, 3)
    texts = CalibrationText(out, open_checkpoint(str(folder)), options, Runtime(CPU, torch.float32))
    return texts.windows(False, Silent(), Ranks.alone())


def test_windows_are_those_of_the_parts(tiny, text_file, fox, tmp_path):
    folder = tiny("llama-gqa")
    named = [f"{text_file}:0.5", "self:0.2", f"{fox}:0.3"]
    mixed = windows_of(folder, combined(named), 10, tmp_path / "stats.safetensors")
    tokenizer = load_tokenizer(folder)
    assert mixed[:5].tolist() == calibration_windows(str(text_file), tokenizer, 5, 24, 3).tolist()
    assert mixed[5:7].tolist() == windows_of(folder, "self", 2, tmp_path / "other.safetensors").tolist()
    assert mixed[7:].tolist() == calibration_windows(str(fox), tokenizer, 3, 24, 3).tolist()


def test_statistics_are_the_parts_merged(any_tiny, text_file, fox, tmp_path):
    checkpoint = open_checkpoint(str(any_tiny))

    def moments(dataset, nsamples):
        windows = windows_of(any_tiny, dataset, nsamples, tmp_path / "stats.safetensors")
        return measure(checkpoint, windows, CPU, torch.float32, 4, False, Silent()).modules, windows.size

    (mixed, total), (one, n), (two, m) = (
        moments(combined([f"{text_file}:3", f"{fox}:1"]), 12), moments(str(text_file), 9), moments(str(fox), 3),
    )  # fmt: skip
    assert total == n + m
    for key, stats in mixed.items():
        merged = Moments.none(len(stats.mean))
        for part, count in ((one[key], n), (two[key], m)):
            mean, variance = (torch.from_numpy(value).double() for value in (part.mean, part.variance))
            merged.merge(Moments(count, mean, variance * (count - 1)))
        np.testing.assert_allclose(stats.variance, merged.variance, rtol=1e-4)
        np.testing.assert_allclose(stats.mean, merged.mean, rtol=1e-5, atol=1e-5 * np.sqrt(stats.variance).max())


def test_a_single_text_is_recorded_as_ever(tiny, text_file, flap, tmp_path):
    options = ["calibrate", tiny("llama-gqa"), "-d", tmp_path / "run", "--nsamples", 6, *SMALL]
    flap(*options, "--dataset", text_file)
    header = load_header(tmp_path / "run" / "stats.safetensors")
    assert header.settings["dataset"] == header.calibration.dataset == str(text_file)
    assert header.calibration.source_sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert "up to date" in flap(*options, "--dataset", f"{text_file}:7").stderr


def test_the_cache_knows_every_text_and_weight(tiny, text_file, fox, flap, tmp_path):
    def calibrate(*named):
        options = [part for name in named for part in ("--dataset", name)]
        small = ["--nsamples", 6, *SMALL]
        return flap("calibrate", tiny("llama-gqa"), "-d", tmp_path / "run", *options, *small).stderr

    assert "written" in calibrate(text_file, fox)
    assert "up to date" in calibrate(f"{text_file}:2", f"{fox}:2")
    header = load_header(tmp_path / "run" / "stats.safetensors")
    assert header.calibration.dataset == f"{text_file}:0.5+{fox}:0.5"
    assert "written" in calibrate(f"{text_file}:2", fox)
    fox.write_text("jumps over the lazy dog " * 300)
    assert "written" in calibrate(f"{text_file}:2", fox)


def test_run_takes_a_mixture_and_reads_perplexity_on_a_real_text(tiny, text_file, fox, flap, tmp_path):
    named = ["--dataset", "self:1", "--dataset", f"{fox}:2", "--dataset", f"{text_file}:1"]
    run = tmp_path / "run"
    result = flap("run", tiny("llama-gqa"), "-d", run, *named, "--nsamples", 8, *SMALL, "--ratio", 0.3)
    assert "the very text of the calibration" in result.stderr
    report = json.loads((run / "eval.json").read_text())
    assert list(report["perplexity"]) == [str(fox)]
    assert load_stats(run / "stats.safetensors").header.calibration.dataset == f"self:0.25+{fox}:0.5+{text_file}:0.25"
    fox.unlink()  # the first text that is still there serves
    flap("eval", "-d", run, "--no-baseline", *SMALL)
    assert list(json.loads((run / "eval.json").read_text())["perplexity"]) == [str(text_file)]
