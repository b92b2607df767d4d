"""Misuse and hopeless places are told before any work, each in one line."""

import os

import pytest

SMALL = ["--nsamples", 4, "--seqlen", 16]


@pytest.mark.parametrize("command", [["eval"], ["generate", "Hi"], ["export", "gguf"]])
def test_a_default_that_is_not_there_is_no_hub_id(command, flap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = flap(*command, code=1).stderr
    assert "no checkpoint at flap-run/pruned: `flap apply` writes one" in said
    assert "hub" not in said


def test_what_lies_in_a_folder_that_is_there_is_a_path(flap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    said = flap("calibrate", "models/nothing", "--dataset", "pydoc", code=1).stderr
    assert "no such model: models/nothing is neither a checkpoint folder nor a .gguf file" in said


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_unknown_tasks_are_found_before_calibration(command, tiny, flap, text_file, tmp_path):
    options = ("--dataset", text_file, *SMALL, "--tasks", "nosuchtask")
    assert "lm-eval knows no nosuchtask" in flap(command, tiny("llama-gqa"), "-d", tmp_path, *options, code=2).stderr
    assert not (tmp_path / "stats.safetensors").exists()


@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_windows_longer_than_the_model_are_refused(way, tiny, flap, text_file, tmp_path):
    model = tiny("llama-gqa")
    expected = "--seqlen 257: " + str(model) + " has 256 positions"
    more = ("--seqlen", 257, way)
    said = [
        flap("calibrate", model, "--dataset", text_file, "-o", tmp_path / "s.safetensors", *more, code=2).stderr,
        flap("eval", model, "--perplexity", text_file, "-o", tmp_path / "e.json", *more, code=2).stderr,
    ]
    assert all(expected in line for line in said)
    flap("calibrate", model, "--dataset", text_file, "--nsamples", 2, "-o", tmp_path / "s.safetensors", "--seqlen", 256)


def test_options_that_do_nothing_or_too_much(tiny, prune, flap, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    said = flap("apply", "-d", run, "--compensate", "none", "--bias", code=2).stderr
    assert "--bias is for --compensate lstsq" in said
    said = flap("plan", "-d", run, "--attention-exponent", "1e300", code=2).stderr
    assert "--attention-exponent 1e+300: scores become larger than any number" in said


@pytest.mark.parametrize("method", ["mag-sp", "wanda-sp"])
def test_a_structure_that_falls_short_says_so(method, tiny, prune, flap, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    said = flap("plan", "-d", run, "--method", method, "--ratio", 0.2, "--json")
    assert "of the prunable weights go, where 20.00% is asked: structure UL-UM" in said.stderr
    assert "is asked" not in flap("plan", "-d", run, "--ratio", 0.2).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs /proc as a place where nobody may write")
def test_an_unwritable_place_is_told_before_the_work(tiny, flap, text_file, tmp_path, monkeypatch):
    from flapcli.evaluation import measure
    from flapcli.execution import loading

    def never(*_args, **_options):
        raise AssertionError("work was begun")

    monkeypatch.setattr(measure, "load_model", never)
    monkeypatch.setattr(loading, "load_model", never)
    options = ("--perplexity", text_file, "--seqlen", 16, "-o", "/proc/nowhere/eval.json")
    assert "cannot write /proc/nowhere/eval.json" in flap("eval", tiny("llama-gqa"), *options, code=1).stderr
    options = ("--dataset", text_file, *SMALL, "-o", "/proc/nowhere/stats.safetensors")
    assert "cannot write /proc/nowhere" in flap("calibrate", tiny("llama-gqa"), *options, code=1).stderr
