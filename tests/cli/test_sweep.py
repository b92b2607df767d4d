"""One calibration, several ratios: rows equal those of separate runs, and nothing is done twice."""

import csv
import json
import shutil
from xml.etree import ElementTree

import pytest

from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.sweep_results import load_sweep
from flapcli.execution import device
from flapcli.views.paper_table import table


@pytest.fixture(scope="module")
def arguments(tiny, text_file):
    return [tiny("llama-gqa"), "--ratios", "0.3,0.1", "--dataset", text_file, "--nsamples", 8, "--seqlen", 16,
            "--dtype", "float32"]  # fmt: skip


@pytest.fixture(scope="module")
def swept(arguments, flap, tmp_path_factory):
    run = tmp_path_factory.mktemp("sweep") / "run"
    return run, flap("sweep", *arguments, "-d", run)


def stamp(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.suffix != ".svg"}


def test_rows_are_those_of_separate_runs(swept, arguments, flap, tmp_path, text_file):
    run, _ = swept
    sweep = load_sweep(run / "sweep.json")
    assert [row.ratio for row in sweep.rows] == [0.1, 0.3]
    assert (run / "sweep" / "dense.json").exists()
    for row in sweep.rows:
        alone = tmp_path / str(row.ratio)
        flap("run", arguments[0], *arguments[3:], "-d", alone, "--ratio", row.ratio, "--preset", "paper")
        report = json.loads((alone / "eval.json").read_text())
        assert row.perplexity == report["perplexity"]
        assert sweep.dense.perplexity == report["baseline"]["perplexity"]
        assert (row.parameters, row.bytes) == (report["size"]["parameters"], report["size"]["bytes"])
        assert row.achieved == load_plan(alone / "plan.yaml").ratio.achieved
        text = str(text_file)
        assert row.relative[text] == row.perplexity[text] / sweep.dense.perplexity[text]
        assert load_plan(run / row.folder / "plan.yaml").layers == load_plan(alone / "plan.yaml").layers
        assert not (run / row.folder / "pruned").exists()  # each folder goes once it is measured


def test_it_is_shown_and_drawn(swept, flap):
    run, said = swept
    for words in ("dense", "0.1", "0.3", "topics.txt", "parameters", "●"):
        assert words in said.stdout
    picture = ElementTree.parse(run / "sweep" / "sweep.svg")
    assert picture.getroot().tag.endswith("svg")
    assert "perplexity" in "".join(picture.getroot().itertext())
    data = json.loads(flap("show", run / "sweep.json", "--json").stdout)["sweep"]
    assert data == json.loads((run / "sweep.json").read_text())
    assert "sweep" in json.loads(flap("show", run, "--json").stdout)
    assert "sweep of" in flap("show", run).stdout


def test_methods_make_the_papers_table(arguments, flap, tmp_path, text_file):
    """Baselines as they are alone, the paper's figures where a column is of theirs; as CSV and LaTeX."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    said = flap("sweep", *arguments, "-d", run, "--methods", "flap,mag-sp")
    rows = load_sweep(run / "sweep.json").rows
    assert [(row.method, row.ratio) for row in rows] == [(m, r) for m in ("flap", "mag-sp") for r in (0.1, 0.3)]
    flap("run", arguments[0], *arguments[3:], "-d", alone, "--ratio", 0.3, "--method", "mag-sp")
    assert rows[-1].perplexity == json.loads((alone / "eval.json").read_text())["perplexity"]
    lines = list(csv.reader((run / "sweep" / "table.csv").open()))
    assert [line[1:3] for line in lines[1:]] == [["dense", "0"], *([row.method, f"{row.ratio:g}"] for row in rows)]
    latex = (run / "sweep" / "table.tex").read_text()
    assert latex.count(r"\\") == len(lines) and "topics.txt" in said.stdout and "◆ mag-sp" in said.stdout
    sweep = load_sweep(run / "sweep.json")
    named = [model.model_copy(update={"perplexity": {"wikitext2": 9.0}}) for model in sweep.rows]
    beside = table(sweep.model_copy(update={"rows": named, "dense": None}))
    assert ["LLaMA-7B (paper)", "wanda-sp", "0.5", "366.43"] in beside
    assert "did you mean wanda-sp" in flap("sweep", *arguments, "-d", run, "--methods", "wanda", code=2).stderr


def test_asked_again_nothing_is_measured(swept, arguments, flap, tmp_path):
    run = shutil.copytree(swept[0], tmp_path / "run")
    before = stamp(run)
    rows = json.loads(flap("sweep", *arguments, "-d", run, "--json").stdout)["rows"]
    assert [row["ratio"] for row in rows] == [0.1, 0.3]
    assert {path for path, time in stamp(run).items() if before.get(path) != time} == {run / "sweep.json"}
    # --keep brings the folders back without measuring anew; --no-keep leaves those that it did not measure.
    flap("sweep", *arguments, "-d", run, "--keep")
    folder = run / "sweep" / "0.1"
    assert (folder / "pruned" / "config.json").exists()
    assert before[folder / "eval.json"] == (folder / "eval.json").stat().st_mtime_ns
    flap("sweep", *arguments, "-d", run)
    assert (folder / "pruned" / "config.json").exists()
    # What lies there is what its row tells of, whatever another sweep that was interrupted left.
    weights = (folder / "pruned" / "model-00001-of-00001.safetensors").read_bytes()
    flap("apply", "-d", folder, "--compensate", "none")
    flap("sweep", *arguments, "-d", run, "--keep")
    assert (folder / "pruned" / "model-00001-of-00001.safetensors").read_bytes() == weights


def test_other_settings_are_other_points(swept, arguments, flap, tmp_path):
    run = shutil.copytree(swept[0], tmp_path / "run")
    before = stamp(run)
    changed = {}
    for options in ("--compensate none", "--ratios 0.1,0.2", "--no-baseline"):
        flap("sweep", *arguments, "-d", run, *options.split())
        after = stamp(run)
        changed[options] = {str(p.relative_to(run)) for p, time in after.items() if before.get(p) != time}
        before = after
    assert {"sweep/0.1/eval.json", "sweep/0.3/eval.json"} <= changed["--compensate none"]
    assert not {"sweep/dense.json", "stats.safetensors", "sweep/0.1/plan.yaml"} & changed["--compensate none"]
    assert "sweep/0.2/eval.json" in changed["--ratios 0.1,0.2"]
    assert load_sweep(run / "sweep.json").dense is None
    assert load_sweep(run / "sweep.json").rows[0].relative == {}


def test_an_interrupted_sweep_goes_on(arguments, flap, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original, calls = device.torch.from_numpy, []

    def interrupt(*args):
        if (run / "sweep" / "0.1" / "point.json").exists() and (run / "sweep" / "0.3" / "pruned").exists():
            raise KeyboardInterrupt
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(device.torch, "from_numpy", interrupt)
    assert "interrupted" in flap("sweep", *arguments, "-d", run, code=130).stderr
    monkeypatch.undo()
    swept = json.loads((run / "sweep.json").read_text())
    assert swept["unfinished"] == "interrupted"
    assert len(swept["rows"]) == 1
    before = stamp(run)
    assert run / "sweep" / "0.1" / "eval.json" in before
    flap("sweep", *arguments, "-d", run)
    after = stamp(run)
    again = {path for path, time in before.items() if after.get(path) not in (None, time)}
    assert again == {run / "sweep.json"}
    assert not (run / "sweep" / "0.3" / "pruned").exists()
    assert len(load_sweep(run / "sweep.json").rows) == 2


def test_an_edited_plan_is_followed(swept, arguments, flap, tmp_path):
    run = shutil.copytree(swept[0], tmp_path / "run")
    before = load_sweep(run / "sweep.json")
    path = run / "sweep" / "0.1" / "plan.yaml"
    keep = load_plan(path).layers[1].mlp.keep
    path.write_text(path.read_text().replace(f'keep: "{keep}"', 'keep: "0-3"', 1))
    flap("sweep", *arguments, "-d", run)
    after = load_sweep(run / "sweep.json")
    assert after.rows[0].parameters < before.rows[0].parameters
    assert after.rows[0].perplexity != before.rows[0].perplexity
    assert after.rows[1] == before.rows[1]


def test_least_squares_texts_and_types(tiny, flap, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    run = tmp_path / "run"
    flap("sweep", tiny("llama-gqa"), "-d", run, "--ratios", "0.2", "--dataset", text_file, "--nsamples", 8, "--seqlen",
         16, "--compensate", "lstsq", "--perplexity", text_file, "--perplexity", other, "--store-dtype", "bfloat16",
         "--keep")  # fmt: skip
    [row] = load_sweep(run / "sweep.json").rows
    assert set(row.perplexity) == set(row.relative) == {str(text_file), str(other)}
    assert row.stored_as == "BF16"
    pruned = run / "sweep" / "0.2" / "pruned"
    config = json.loads((pruned / "config.json").read_text())
    assert config["flap"]["made_by"]["compensate"] == "lstsq"


def test_output_errors_are_shown(prune, tiny, flap, tmp_path, text_file):
    """Per layer, as config.json has them; a layer that lost nothing has none."""
    run = tmp_path / "run"
    flap("calibrate", tiny("llama-mha"), "-d", run, "--dataset", text_file, "--nsamples", 8, "--seqlen", 16, "--gram")
    flap("plan", "-d", run, "--ratio", 0.3)
    flap("apply", "-d", run, "--compensate", "lstsq")
    errors = json.loads((run / "pruned" / "config.json").read_text())["flap"]["output_error"]
    shown = flap("show", run / "pruned").stdout
    found = [pair for pairs in errors.values() for pair in pairs if pair]
    assert found
    for before, after in found:
        assert f"{before:.2%} -> {after:.2%}" in shown
        assert after <= before
    data = json.loads(flap("show", run / "pruned", "--json").stdout)["checkpoint"]
    assert data["flap"]["output_error"] == errors
    flap("apply", "-d", run, "--compensate", "bias")
    assert "output variance lost" not in flap("show", run / "pruned").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ratios 0.1,x", "--ratios 0.1,x: give shares"),
        ("--ratios 0.1,1.5", "--ratios 0.1,1.5: give shares"),
        ("--ratios nan", "--ratios nan: give shares"),
        ("--structure AL-MM", "needs --remove-heads N"),
        ("--method mag-sp --metric IFV", "--metric IFV"),
        ("--perplexity nowhere.txt", "no such file"),
        ("--ratios 0.1,0.99", "--ratio 0.99 can't be reached"),
    ],
)
def test_misuse_costs_nothing(arguments, flap, tmp_path, options, words):
    run = tmp_path / "run"
    said = flap("sweep", *arguments, "-d", run, *options.split(), code=2).stderr
    assert words in said
    assert "Traceback" not in said
    assert not list(run.glob("sweep/*/pruned"))
    assert not (run / "sweep.json").exists()


def test_a_foreign_sweep_json_is_kept(arguments, flap, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "sweep.json").write_text('{"mine": 1}')
    assert "is not a sweep of flap's" in flap("sweep", *arguments, "-d", run, code=1).stderr
    assert (run / "sweep.json").read_text() == '{"mine": 1}'
    assert not (run / "stats.safetensors").exists()
