"""Artifacts that are broken or edited: what reads them says what is wrong, or does without."""

import json
import shutil
import struct

import pytest


@pytest.fixture(scope="module")
def whole(prune, tiny, flap, text_file, tmp_path_factory):
    run = prune(tiny("llama-gqa"), tmp_path_factory.mktemp("whole") / "run")
    flap("sweep", tiny("llama-gqa"), "-d", run, "--dataset", text_file, "--nsamples", 12, "--seqlen", 24, "--dtype",
         "float32", "--ratios", 0.3, "--perplexity", text_file)  # fmt: skip
    shutil.copy(run / "sweep" / "0.3" / "eval.json", run)
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("format: flap-plan/1", "format: 2020-99-99", "is not YAML"),
        ("index: 0", f"index: {'9' * 5000}", "is not YAML"),
        ('of: 3, keep: "', 'of: 3, keep: "\u0661,', "neither an index nor a range"),
        ('of: 3, keep: "', 'of: 3, keep: "0-9999999,10000000-19999999,', "runs backwards or is too long"),
        ("weights: ", "weights: -", "weights: must be greater than or equal to 0"),
    ],
)
def test_plans(old, new, words, run, flap):
    path = run / "plan.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert words in flap("apply", "-d", run, code=1).stderr


@pytest.mark.parametrize("value", ["0", "-1", "9" * 30])
def test_sizes_in_statistics(value, run, flap):
    path = run / "stats.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = data[8 : 8 + length].replace(b'\\"num_key_value_heads\\":3', f'\\"num_key_value_heads\\":{value}'.encode())
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])
    assert "num_key_value_heads: must be" in flap("plan", "-d", run, code=1).stderr


def test_a_sweep_without_rows_or_of_unlike_texts(run, flap):
    path = run / "sweep.json"
    sweep = json.loads(path.read_text())
    for bad, words in (
        ({"rows": []}, "it has no rows"),
        ({"dense": sweep["dense"] | {"perplexity": {"other": 2.0}}}, "not measured on the same texts"),
    ):
        path.write_text(json.dumps(sweep | bad))
        assert words in flap("show", path, code=1).stderr


def test_a_baseline_that_lacks_a_text(run, flap):
    path = run / "eval.json"
    report = json.loads(path.read_text())
    report["baseline"] = {"checkpoint": "x", "perplexity": {}, "size": report["size"]}
    path.write_text(json.dumps(report))
    flap("report", "-d", run)
    flap("show", path)


def test_a_pruned_folder_with_deep_json(run, flap):
    (run / "pruned" / "config.json").write_text("[" * 100_000)
    assert "config.json can't be read as JSON" in flap("show", run, code=1).stderr
