"""What was measured before a later part failed, or could not be saved: printed, kept, and gone on from."""

import json

import pytest

from flapcli.artifacts.eval_report import load_report
from flapcli.errors import FlapError
from flapcli.evaluation import measure, peak_memory, speed

SMALL = ["--seqlen", 16, "--speed-rounds", 1, "--speed-lengths", 4, "--speed-new-tokens", 1]


@pytest.fixture(scope="module")
def run(tiny, prune, tmp_path_factory):
    return prune(tiny("llama-gqa"), tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def texts(tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"the quick brown fox {name} jumps over the lazy dog. " * 20)
    return [part for name in ("one.txt", "two.txt") for part in ("--perplexity", tmp_path / name)]


REAL = {name: getattr(place, name) for place, name in ((measure, "window_losses"), (speed, "measure_speed"))}


def failing(monkeypatch, place, name, words, error):
    """Make the call of a measuring function fail whose arguments end in these words; returns the calls' words."""
    real, called = REAL[name], []

    def call(*args, **kwargs):
        called.append(str(args[-1]))
        if called[-1].endswith(words):
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, call)
    return called


@pytest.mark.parametrize(
    ("place", "name", "words", "measured", "error"),
    [
        (measure, "window_losses", "pruned on {one} --divergence", (0, 2), RuntimeError("a kernel died")),
        (measure, "window_losses", "pruned on {two}", (1, 0), FlapError("the loss is not finite")),
        (measure, "window_losses", "dense on {one}", (2, 0), RuntimeError("a kernel died")),
        (measure, "window_losses", "dense on {two}", (2, 1), KeyboardInterrupt()),
        (speed, "measure_speed", "", (2, 2), RuntimeError("a kernel died")),
    ],
)
def test_a_later_part_fails(run, flap, texts, tmp_path, monkeypatch, place, name, words, measured, error):
    out = tmp_path / "eval.json"
    monkeypatch.setattr(peak_memory, "peak_memory", lambda *_: 1)  # which takes a process of its own
    words, *more = words.split(" --divergence")
    command = ["eval", "-d", run, "-o", out, *texts, *SMALL, "--speed", *(["--divergence"] if more else [])]
    failing(monkeypatch, place, name, words.format(one=texts[1], two=texts[3]), error)
    result = flap(*command, code=130 if isinstance(error, KeyboardInterrupt) else 1)
    line = result.stderr.splitlines()[-1]
    assert f"what was measured until then is in {out}, and the next run goes on from there" in line
    assert (str(error) or "interrupted") in line
    assert "unfinished: " in result.stdout
    report = load_report(out)
    assert (len(report.perplexity), len(report.baseline.perplexity) if report.baseline else 0) == measured
    for view in (["show", out], ["compare", out, out]):
        flap(*view)
    monkeypatch.setattr(place, name, REAL[name])
    called = failing(monkeypatch, measure, "window_losses", "never", error)
    assert "written" in flap(*command).stderr
    assert len(called) == 4 - sum(measured) + (2 - measured[0] if more else 0)  # what is held against is read anew
    whole = load_report(out)
    assert whole.unfinished is None
    assert (len(whole.perplexity), len(whole.baseline.perplexity), len(whole.speedup)) == (2, 2, 1)
    assert whole.perplexity.items() >= report.perplexity.items()
    assert "up to date" in flap(*command).stderr


def test_a_whole_evaluation_is_not_replaced_by_a_part(run, flap, texts, tmp_path, monkeypatch):
    out = tmp_path / "eval.json"
    flap("eval", "-d", run, "-o", out, *texts[:2], *SMALL[:2])
    before = out.read_bytes()
    failing(monkeypatch, measure, "window_losses", f"dense on {texts[1]}", RuntimeError("a kernel died"))
    result = flap("eval", "-d", run, "-o", out, *texts[:2], "--seqlen", 8, code=1)
    assert f"is printed alone: {out} stays as it was" in result.stderr
    assert "unfinished: RuntimeError: a kernel died" in result.stdout
    assert out.read_bytes() == before


@pytest.mark.parametrize("command", ["eval", "run"])
def test_what_cannot_be_saved_is_printed(command, tiny, run, flap, text_file, texts, tmp_path, monkeypatch):
    from flapcli.evaluation import stage

    def full(path, _report):
        raise FlapError(f"{path}: no space left")

    monkeypatch.setattr(stage, "save_report", full)
    where = ["-d", run] if command == "eval" else [tiny("llama-gqa"), "-d", tmp_path / "run", "--dataset", text_file]
    more = [] if command == "eval" else ["--nsamples", 3]
    result = flap(command, *where, *texts, "--seqlen", 16, "--json", *more, code=1)
    assert "no space left; what was measured is printed alone" in result.stderr.splitlines()[-1]
    made = json.loads(result.stdout)
    assert len((made if command == "eval" else made["eval"])["perplexity"]) == 2


def test_a_sweep_keeps_the_rows_that_are_there(tiny, flap, text_file, tmp_path, monkeypatch):
    command = ["sweep", tiny("llama-gqa"), "-d", tmp_path, "--ratios", "0.1,0.3", "--dataset", text_file,
               "--nsamples", 3, "--seqlen", 16]  # fmt: skip
    failing(monkeypatch, measure, "window_losses", "never", None)
    from flapcli import sweep

    measured = sweep._Job.measured
    monkeypatch.setattr(sweep._Job, "measured", lambda job, p: measured(job, p) if p.ratio < 0.3 else 1 / 0)
    result = flap(*command, code=1)
    assert "ZeroDivisionError" in result.stderr.splitlines()[-1]
    assert "unfinished: ZeroDivisionError" in result.stdout
    assert [row["ratio"] for row in json.loads((tmp_path / "sweep.json").read_text())["rows"]] == [0.1]
    flap("show", tmp_path / "sweep.json")
    monkeypatch.undo()
    flap(*command)
    swept = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["ratio"] for row in swept["rows"]] == [0.1, 0.3]
    assert swept["unfinished"] is None
