"""Presets: the same as the options that they stand for, and what is given stands."""

import json

import pytest
from support.edits import edit_keep

from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_header
from flapcli.checkpoints import open_checkpoint
from flapcli.cli.presets import PRESETS, preset_of
from flapcli.texts.mixture import Mixture
from flapcli.views.commands import calibrate_asked

SPELLED = {
    "calibrate": "--gram --fisher --dataset {text}:16 --dataset self:16 --nsamples 32 --attention-unit query_head",
    "plan": "--metric FISHER-OBS --structure AL-AM",
    "apply": "--compensate lstsq --no-bias --sequential",
}


def stages(flap, model, text, run, options):
    common = ["--nsamples", 16, "--seqlen", 16]
    dataset = [] if "--dataset" in options["calibrate"] else ["--dataset", text]
    flap("calibrate", model, "-d", run, *common, *dataset, *options["calibrate"].split())
    flap("plan", "-d", run, "--ratio", 0.3, *options["plan"].split())
    flap("apply", "-d", run, *options["apply"].split())


def test_best_is_what_it_stands_for(tiny, text_file, flap, tmp_path):
    model, best, spelled = tiny("llama-gqa"), tmp_path / "best", tmp_path / "spelled"
    stages(flap, model, text_file, best, dict.fromkeys(SPELLED, "--preset best"))
    stages(flap, model, text_file, spelled, {k: v.format(text=text_file) for k, v in SPELLED.items()})
    for name in ("stats.safetensors", "plan.yaml", "pruned/model-00001-of-00001.safetensors"):
        assert (best / name).read_bytes() == (spelled / name).read_bytes()
    assert load_plan(best / "plan.yaml").metric == "FISHER-OBS"


def test_best_takes_query_heads_where_layers_allow_it(tiny, text_file, flap, tmp_path):
    """And says of KV groups that they were asked for, where they could have been parted."""
    model, run = tiny("llama-gqa"), tmp_path / "run"
    options = f"--preset best --dataset {text_file} --nsamples 4 --seqlen 16".split()
    flap("calibrate", model, "-d", run, *options)
    parted = load_header(run / "stats.safetensors")
    assert parted.model.attention_unit == "query_head"
    whole = parted.model_copy(update={"model": parted.model.with_attention_unit("kv_group")})
    lines = [calibrate_asked(header, PRESETS["best"]).line([], "run") for header in (parted, whole)]
    assert ["--attention-unit" in line for line in lines] == [False, True]
    flap("calibrate", model, "-d", run, *options, "--attention-unit", "kv_group")
    flap("plan", "-d", run, "--ratio", 0)
    edit_keep(run, (0, "attention"), keep="0")
    flap("apply", "-d", run, "--compensate", "none")
    unlike = open_checkpoint(str(run / "pruned"))
    unlike.prefers_query_heads = True
    assert unlike.shape.attention_unit is None and not unlike.shape.parts_groups


def test_run_and_sweep_take_it(tiny, text_file, flap, tmp_path):
    model, run = tiny("llama-gqa"), tmp_path / "run"
    options = ["--dataset", text_file, "--seqlen", 16, "--perplexity", text_file, "--perplexity-windows", 20]
    flap("run", model, "-d", run, "--ratio", 0.3, *options)  # best is its default
    assert load_header(run / "stats.safetensors").calibration.nsamples == 256
    config = json.loads((run / "pruned" / "config.json").read_text())["flap"]
    assert config["made_by"]["compensate"] == "lstsq"
    assert config["made_by"]["lstsq_bias"] is False
    swept = flap("sweep", model, "-d", run, "--preset", "best", "--ratios", 0.3, *options, "--json")
    rows = json.loads(swept.stdout)["rows"]
    one = json.loads((run / "eval.json").read_text())
    assert rows[0]["perplexity"] == one["perplexity"]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (None, ["pydoc", "self"]),
        (["ptb"], ["ptb", "self"]),
        (["ptb:1"], ["ptb"]),
        (["self"], ["self"]),
        (["ptb:2", "c4"], ["ptb", "c4"]),
    ],
)
@pytest.mark.parametrize("nsamples", [128, 1024, 11])
def test_text_of_best(named, found, nsamples):
    """All windows asked for, and as many of the model's own beside them."""
    mixture, total = PRESETS["best"].text(named, "pydoc", nsamples)
    assert list(Mixture.read(mixture).sources) == found
    counts = Mixture.read(mixture).counts(total)
    if "self" in found[1:]:
        assert counts == [nsamples, nsamples]
    else:
        assert sum(counts) == nsamples
    assert PRESETS["paper"].text(["ptb"], "pydoc", nsamples) == ("ptb", nsamples)


def test_each_preset_has_its_number_of_windows():
    assert [PRESETS[name].text(["ptb:1"], "pydoc")[1] for name in ("paper", "best")] == [1024, 128]


def test_given_options_stand(tiny, text_file, flap, tmp_path):
    model, run = tiny("llama-gqa"), tmp_path / "run"
    flap(
        "calibrate",
        model,
        "-d",
        run,
        "--preset",
        "best",
        "--dataset",
        f"{text_file}:1",
        "--nsamples",
        8,
        "--seqlen",
        16,
    )
    assert load_header(run / "stats.safetensors").calibration.dataset == str(text_file)
    flap("plan", "-d", run, "--preset", "best", "--metric", "IFV", "--structure", "UL-UM")
    plan = load_plan(run / "plan.yaml")
    assert (plan.metric, plan.structure) == ("IFV", "UL-UM")
    flap("apply", "-d", run, "--preset", "best", "--compensate", "bias")
    made_by = json.loads((run / "pruned" / "config.json").read_text())["flap"]["made_by"]
    assert made_by["compensate"] == "bias"


def test_refused(tiny, text_file, flap, tmp_path):
    run = tmp_path / "run"
    refused = flap("plan", "-d", run, "--preset", "best", "--method", "mag-sp", code=2)
    assert "--preset best: --method mag-sp is a baseline" in refused.stderr
    flap("calibrate", tiny("llama-gqa"), "-d", run, "--dataset", text_file, "--nsamples", 8, "--seqlen", 16)
    assert "flap calibrate --gram --fisher" in flap("plan", "-d", run, "--preset", "best", code=1).stderr
    assert preset_of("paper", "mag-sp") == preset_of(None, "mag-sp") == PRESETS["paper"]
    assert preset_of(None) == PRESETS["best"]


def test_a_target_counts_biases_that_are_given_beside_the_preset(tiny, text_file, flap, tmp_path):
    """--bias beside best: apply adds them, so the plan must have counted them."""
    options = f"--preset best --bias --no-sequential --dataset {text_file} --nsamples 16 --seqlen 16".split()
    model = tiny("llama-gqa")
    limit = int(open_checkpoint(str(model)).shape.parameters * 0.9)
    flap("run", model, "-d", tmp_path, *options, "--target-params", limit, "--perplexity", text_file, "--no-baseline")
    assert load_plan(tmp_path / "plan.yaml").settings["target_biases"] is True
    assert open_checkpoint(str(tmp_path / "pruned")).shape.parameters <= limit
