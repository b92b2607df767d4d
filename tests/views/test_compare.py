"""Runs side by side, and plans apart."""

import json
import shutil

import pytest
from support.edits import edit_keep

from flapcli.artifacts.plan import load_plan


@pytest.fixture(scope="module")
def runs(tiny, prune, flap, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = [prune(tiny("llama-gqa"), folder / name, f"--ratio {name}") for name in ("0.2", "0.5")]
    for run in made:
        flap("eval", "-d", run, "--perplexity", text_file, "--seqlen", 16)
    return made


def test_compare_shows_what_differs_and_every_figure(runs, flap, text_file):
    found = json.loads(flap("compare", *runs, "--json").stdout)
    reports = [json.loads((run / "eval.json").read_text()) for run in runs]
    assert found["columns"] == ["dense", *map(str, runs)]
    assert found["differ"]["ratio"] == [0.2, 0.5]
    assert set(found["differ"]) == {"ratio", "ratio achieved"}
    assert found["shared"]["metric"] == "WIFV"
    values = [reports[0]["baseline"], *reports]
    assert found["figures"]["parameters"] == [value["size"]["parameters"] for value in values]
    perplexities = [value["perplexity"][str(text_file)] for value in values]
    assert found["figures"][f"perplexity {text_file}"] == perplexities
    table = flap("compare", *runs).stdout
    assert "dense" in table
    assert "ratio" in table


def test_compare_needs_two_evaluated_runs(runs, flap, tiny, prune, tmp_path):
    assert "at least two" in flap("compare", runs[0], code=2).stderr
    bare = prune(tiny("llama-gqa"), tmp_path / "bare")
    assert "flap eval -d" in flap("compare", runs[0], bare, code=1).stderr


def test_diff_names_the_very_units(runs, flap, tmp_path):
    path = runs[0] / "plan.yaml"
    edited = shutil.copy(path, tmp_path)
    edit_keep(tmp_path, (1, "mlp"), keep="0-1,5")
    kept = set(load_plan(path).kept(1, "mlp").tolist())
    found = json.loads(flap("diff", path, edited, "--json").stdout)
    [layer] = found["layers"]
    assert layer["layer"] == 1
    assert set(layer) == {"layer", "mlp"}
    assert found["totals"]["mlp"]["only_first"] == len(kept - {0, 1, 5})
    assert found["totals"]["mlp"]["only_second"] == len({0, 1, 5} - kept)
    assert found["totals"]["attention"] == {
        "kept_by_both": sum(load_plan(path).counts("attention")), "only_first": 0, "only_second": 0,
    }  # fmt: skip
    assert "kept by both" in flap("diff", runs[0], edited).stdout


def test_diff_of_equal_plans_is_empty_and_of_unlike_models_refused(runs, flap, tiny, prune, tmp_path):
    found = json.loads(flap("diff", runs[0], runs[0], "--json").stdout)
    assert found["layers"] == []
    assert found["settings"] == {}
    other = prune(tiny("llama-mha"), tmp_path / "other")
    assert "unlike sizes" in flap("diff", runs[0], other, code=1).stderr
