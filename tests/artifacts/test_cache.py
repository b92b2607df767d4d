"""Asked again for the same, a stage answers from its artifact; asked for something else, it works anew."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from flapcli.artifacts.plan import load_plan
from flapcli.storage.owner import Owner


@pytest.fixture
def run(prune, tiny, tmp_path, flap, text_file):
    folder = prune(tiny("llama-gqa"), tmp_path / "run")
    flap("eval", "-d", folder, "--perplexity", text_file, "--seqlen", 16)
    return folder


def stamp(run):
    return {path.name: path.stat().st_mtime_ns for path in run.iterdir()}


def test_nothing_is_done_twice(run, flap, prune, tiny, text_file):
    before = stamp(run)
    prune(tiny("llama-gqa"), run)
    result = flap("eval", "-d", run, "--perplexity", text_file, "--seqlen", 16)
    assert "up to date" in result.stderr
    assert stamp(run) == before


def test_force_works_anew_and_gives_the_same(run, flap, tiny, text_file):
    stats, plan = ((run / name).read_bytes() for name in ("stats.safetensors", "plan.yaml"))
    before = stamp(run)
    small = ["--nsamples", "12", "--seqlen", "24", "--dtype", "float32", "--force"]
    flap("calibrate", tiny("llama-gqa"), "-d", run, "--dataset", text_file, *small)
    flap("plan", "-d", run, "--ratio", 0.3, "--force")
    flap("apply", "-d", run, "--force")
    after = stamp(run)
    assert all(after[name] != before[name] for name in ("stats.safetensors", "plan.yaml", "pruned"))
    assert (run / "stats.safetensors").read_bytes() == stats
    assert (run / "plan.yaml").read_bytes() == plan


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("calibrate", "--seed 1"), ("calibrate", "--nsamples 11"), ("calibrate", "--gram"),
        ("plan", "--ratio 0.31"), ("plan", "--metric IFV"), ("plan", "--round-to 8"), ("plan", "--tensor-parallel 2"),
        ("apply", "--compensate none"), ("apply", "--dtype bfloat16"), ("apply", "--mask-only"),
        ("eval", "--seqlen 17"), ("eval", "--no-baseline"),
    ],
)  # fmt: skip
def test_other_settings_replace_the_artifact(run, flap, tiny, text_file, stage, options):
    before = stamp(run)
    same = {
        "calibrate": [
            tiny("llama-gqa"),
            "--dataset",
            text_file,
            *["--nsamples", "12", "--seqlen", "24", "--dtype", "float32"],
        ],
        "plan": ["--ratio", 0.3],
        "apply": [],
        "eval": ["--perplexity", text_file, "--seqlen", 16],
    }[stage]
    artifact = {"calibrate": "stats.safetensors", "plan": "plan.yaml", "apply": "pruned", "eval": "eval.json"}[stage]
    assert "up to date" in flap(stage, "-d", run, *same).stderr
    assert "written" in flap(stage, "-d", run, *same, *options.split()).stderr
    renewed = {"pruned"} if stage == "eval" else set()  # its model card now says the perplexities
    assert {name for name, time in stamp(run).items() if time != before[name]} == {artifact} | renewed
    assert set(stamp(run)) == set(before)  # no scratch file is left


def test_a_changed_text_is_another_text(run, flap, tiny, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("the quick brown fox " * 200)
    args = ("calibrate", tiny("llama-gqa"), "-d", run, "--dataset", text, "--nsamples", 3, "--seqlen", 8)
    assert "written" in flap(*args).stderr
    assert "up to date" in flap(*args).stderr
    text.write_text("jumps over the lazy dog " * 200)
    assert "written" in flap(*args).stderr


def test_a_changed_model_is_another_model(run, flap, tiny, text_file, tmp_path):
    model = shutil.copytree(tiny("llama-gqa"), tmp_path / "model")
    args = ("calibrate", model, "-d", tmp_path / "two", "--dataset", text_file, "--nsamples", 3, "--seqlen", 8)
    flap(*args)
    assert "up to date" in flap(*args).stderr
    config = model / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert "written" in flap(*args).stderr


def test_models_of_one_shape_are_told_apart_by_name_and_revision(flap, tiny, text_file, tmp_path):
    """Two fine-tunes have one fingerprint, which is of sizes and headers."""
    text = ("--dataset", text_file, "--nsamples", 3, "--seqlen", 8)
    one, two = (shutil.copytree(tiny("llama-gqa"), tmp_path / name) for name in ("one", "two"))
    weights = load_file(two / "model.safetensors")
    save_file({name: 1.5 * value for name, value in weights.items()}, two / "model.safetensors", {"format": "pt"})
    measure = ("eval", "-d", tmp_path, "--no-baseline", "--perplexity", text_file, "--seqlen", 8)
    found = [json.loads(flap(*measure, model, "--json").stdout)["perplexity"] for model in (one, two)]
    assert found[0] != found[1]
    assert "up to date" in flap(*measure, two).stderr
    assert "written" in flap(*measure, two, "--device", "cpu").stderr
    calibrate = ("calibrate", one, "-d", tmp_path, *text, "--revision")
    flap(*calibrate, "v1")
    assert "up to date" in flap(*calibrate, "v1").stderr
    assert "written" in flap(*calibrate, "v2").stderr


def test_an_edited_plan_stays_and_is_followed(run, flap):
    plan = run / "plan.yaml"
    before = load_plan(plan)
    keep = before.layers[1].mlp.keep
    plan.write_text(plan.read_text().replace(f'keep: "{keep}"', 'keep: "0-3"', 1))
    edited = load_plan(plan)
    assert edited.ratio.achieved > before.ratio.achieved
    assert edited.parameters.kept < before.parameters.kept
    assert "up to date" in flap("plan", "-d", run, "--ratio", 0.3).stderr
    assert load_plan(plan) == edited
    assert "written" in flap("apply", "-d", run).stderr


def test_show_says_what_is_there(run, flap):
    import json

    whole = json.loads(flap("show", run, "--json").stdout)
    assert set(whole) == {"stats", "plan", "checkpoint", "eval"}
    assert whole["stats"]["calibration"]["nsamples"] == 12
    for name in ("stats.safetensors", "plan.yaml", "pruned", "eval.json"):
        assert len(json.loads(flap("show", run / name, "--json").stdout)) == 1
        assert flap("show", run / name).stdout


def test_a_folder_between_both_renames_comes_back(run, flap):
    """A process that was killed while it replaced pruned/ left the old one aside, and nothing in its place."""
    left = run / f".pruned.old-{Owner.here()._replace(started='1')}-00"
    (run / "pruned").rename(left)
    assert "up to date" in flap("apply", "-d", run).stderr
    assert not left.exists()


def test_a_link_stays_and_what_it_points_to_is_replaced(run, flap, tmp_path):
    elsewhere = tmp_path / "large disk" / "pruned"
    elsewhere.parent.mkdir()
    (run / "pruned").rename(elsewhere)
    (run / "pruned").symlink_to(elsewhere)
    assert "written" in flap("apply", "-d", run, "--compensate", "none").stderr
    assert (run / "pruned").is_symlink()
    made_by = json.loads((elsewhere / "config.json").read_text())["flap"]["made_by"]
    assert made_by["compensate"] == "none"
    assert [path.name for path in elsewhere.parent.iterdir()] == ["pruned"]


def test_leftovers_of_a_killed_run_are_cleared(run, flap):
    left = run / f".pruned.tmp-{Owner.here()._replace(started='1')}-00"
    left.mkdir()
    (left / "model-00001-of-00001.safetensors").write_bytes(b"half")
    flap("apply", "-d", run, "--force")
    assert not left.exists()
