"""The calibration's text, found again from another folder, and told from another text in its place."""

import json

import pytest

from flapcli.artifacts.stats import load_header

SMALL = ("--seqlen", 16, "--batch-size", 4)


@pytest.fixture
def run(tmp_path, monkeypatch, tiny, text_file, flap):
    """A run on `own.txt`, named from the folder that holds it; what follows is run in another, with its own one."""
    home, other = tmp_path / "home", tmp_path / "other"
    for folder, text in ((home, text_file.read_text()), (other, "another text " * 500)):
        folder.mkdir()
        (folder / "own.txt").write_text(text)
    monkeypatch.chdir(home)
    for command in (["calibrate", tiny("llama-gqa"), "--gram", "--dataset", "own.txt", "--nsamples", 4, *SMALL],
                    ["plan", "--ratio", 0.3]):  # fmt: skip
        flap(*command, "-d", home / "run")
    monkeypatch.chdir(other)
    return home / "run"


def test_a_text_is_known_by_its_absolute_path(run, flap, tmp_path):
    text = tmp_path / "home" / "own.txt"
    assert load_header(run / "stats.safetensors").calibration.dataset == str(text)
    flap("apply", "-d", run, "--compensate", "lstsq", "--sequential")  # reads the text again
    noted = flap("eval", "-d", run, "--no-baseline", *SMALL).stderr
    assert f"{text}, the very text of the calibration" in noted.replace("\n", " ")
    assert list(json.loads((run / "eval.json").read_text())["perplexity"]) == [str(text)]
    card = (run / "pruned" / "README.md").read_text()
    assert "| calibration text | own.txt |" in card
    assert str(tmp_path) not in card


def test_a_text_that_changed_is_not_the_very_text(run, flap, tmp_path):
    flap("apply", "-d", run)
    (tmp_path / "home" / "own.txt").write_text("something else " * 500)
    noted = flap("eval", "-d", run, "--no-baseline", *SMALL).stderr.replace("\n", " ")
    assert "the very text" not in noted
    assert "which is not what it was at the calibration" in noted
